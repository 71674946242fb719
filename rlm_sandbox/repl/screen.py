"""`Screen`: cells as they run, in words. Text of a guest reaches a terminal only through `inert`."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.text import Text

from ..console import inert, limit_words, one_line, state_words
from ..results import ExecResult, OutputChunk

__all__ = ("Screen",)

#: Characters of an echoed value and of a traceback that are shown.
MAX_VALUE_CHARS: Final = 20_000
MAX_TRACEBACK_CHARS: Final = 10_000


class Screen:
    """Results and values on ``out``; errors, notices and the guest's stderr on ``err``. Called by one thread at a time."""

    def __init__(self, out: Console, err: Console) -> None:
        self._out = out
        self._err = err
        self._left: int | None = None
        self._open: Console | None = None
        """Where the guest left a line open."""

    def begin_cell(self, max_chars: int | None) -> None:
        """A cell starts, of whose output at most ``max_chars`` are shown."""
        self._left = max_chars

    def output(self, chunk: OutputChunk) -> None:
        """Show a piece of output as it appears."""
        text = chunk.text if self._left is None else chunk.text[: self._left]
        if not text:
            return
        if self._left is not None:
            self._left -= len(text)
        console, style = (self._err, "yellow") if chunk.stream == "stderr" else (self._out, "")
        console.print(Text(_fit(console, inert(text)), style), end="", soft_wrap=True)
        console.file.flush()
        self._open = None if text.endswith("\n") else console

    def result(self, result: ExecResult) -> None:
        """Show what a cell came to."""
        self._end_line()
        if result.dropped_bytes:
            self.notice(f"{result.dropped_bytes:,} bytes of output were over the limit and are dropped")
        if result.value is not None:
            self._print(self._out, _cut(result.value, MAX_VALUE_CHARS))
        if result.outcome == "error":
            said = (result.traceback or result.error or "error").rstrip("\n")
            self._print(self._err, _cut(said, MAX_TRACEBACK_CHARS), "red")
        elif result.outcome == "limit" and result.limit is not None:
            self._print(self._err, limit_words(result.limit), "bold yellow")
        elif result.outcome != "ok":
            why = f": {one_line(result.error, 300)}" if result.error else ""
            self._print(self._err, f"{result.outcome}{why}", "bold red")
        if result.outcome not in ("ok", "error") or result.state != "kept":
            style = "bold red" if result.state == "lost" else "bold green"
            self._print(self._err, state_words(result.state, result.lost_names), style)

    def notice(self, text: str) -> None:
        """Say something about the session."""
        self._end_line()
        self._print(self._err, text, "dim")

    def complaint(self, text: str) -> None:
        """Say what went wrong with the session."""
        self._end_line()
        self._print(self._err, text, "bold red")

    def _print(self, console: Console, text: str, style: str = "") -> None:
        console.print(Text(_fit(console, inert(text)), style), soft_wrap=True)

    def _end_line(self) -> None:
        if self._open is not None:
            self._open.print()
            self._open = None


def _fit(console: Console, text: str) -> str:
    """``text`` with an escape for what the terminal's encoding does not have."""
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit:,} more characters]"
