"""`Prompt`: cells typed at a terminal, with history, several lines, and completion of names."""

from __future__ import annotations

import builtins
import keyword
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_completions
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ..context import CONTEXT_METHODS
from .cells import INDENT, ends_cell, next_indent

__all__ = ("NameCompleter", "Prompt", "open_history")

_WORD: Final = re.compile(r"[\w.]*$")
_ALWAYS: Final = frozenset(keyword.kwlist) | {name for name in dir(builtins) if not name.startswith("_")}


class NameCompleter(Completer):
    """Completes the session's names, Python's own, and the methods of ``ctx``. It asks nobody: it runs no guest code."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """What may follow the word before the cursor."""
        found = _WORD.search(document.current_line_before_cursor)
        word = found[0] if found else ""
        owner, dot, start = word.rpartition(".")
        candidates: Any = (CONTEXT_METHODS if owner == "ctx" else ()) if dot else self.names | _ALWAYS
        if not dot and not start:
            return
        for name in sorted(candidates):
            if name.startswith(start):
                yield Completion(name, start_position=-len(start))


class Prompt:
    """Reads cells. ``options`` go to prompt_toolkit: where the keys come from and the screen is, for tests."""

    def __init__(self, history: History | None = None, **options: Any) -> None:
        self._completer = NameCompleter()
        self._session: PromptSession[str] = PromptSession(
            ">>> ",
            multiline=True,
            prompt_continuation="... ",
            history=history if history is not None else InMemoryHistory(),
            completer=self._completer,
            complete_while_typing=False,
            key_bindings=_bindings(),
            include_default_pygments_style=False,
            **options,
        )

    def read(self, names: frozenset[str]) -> str:
        """See `CellReader.read`."""
        self._completer.names = names
        return self._session.prompt()


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not buffer.document.text_after_cursor.strip() and ends_cell(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n" + next_indent(buffer.document.text_before_cursor))

    @bindings.add("tab", filter=Condition(_in_indentation))
    def _tab(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text(" " * INDENT)

    @bindings.add("tab", filter=~Condition(_in_indentation) & ~has_completions)
    def _complete(event: KeyPressEvent) -> None:
        # What can only be one name is there before the next key; prompt_toolkit would look for it in the background.
        buffer = event.current_buffer
        found = list(buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
        if len(found) == 1:
            buffer.insert_text(found[0].text[-found[0].start_position :])
        elif found:
            buffer.start_completion(insert_common_part=True)

    @bindings.add("backspace", filter=Condition(_in_indentation))
    def _backspace(event: KeyPressEvent) -> None:
        before = len(event.current_buffer.document.current_line_before_cursor)
        event.current_buffer.delete_before_cursor((before - 1) % INDENT + 1 if before else 1)

    return bindings


def _in_indentation() -> bool:
    return not get_app().current_buffer.document.current_line_before_cursor.strip(" ")


def open_history() -> History:
    """The history file below ``XDG_STATE_HOME``, readable by its owner alone; in memory where there can be none."""
    try:
        home = os.environ.get("XDG_STATE_HOME", "")
        base = Path(home) if home.startswith("/") else Path.home() / ".local" / "state"
        path = base / "rlm-sandbox" / "repl_history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
        return FileHistory(path)
    except (OSError, RuntimeError):
        return InMemoryHistory()
