"""`Shell`: cells into a session and results onto the screen, until the input ends."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Final, Protocol

from ..errors import SandboxError, SessionClosed
from ..protocol import REPLProtocol
from ..results import ExecResult
from ..waiting import take
from .screen import Screen

__all__ = ("CellReader", "Shell")

#: Names that are kept for completion, and how long one may be: they are a guest's.
MAX_NAMES: Final = 2_000
MAX_NAME_CHARS: Final = 100


class CellReader(Protocol):
    """Where typed cells come from."""

    def read(self, names: frozenset[str]) -> str:
        """The next cell. ``names`` are those of the session.

        Raises:
            EOFError: there is none (Ctrl-D).
            KeyboardInterrupt: what was typed so far is dropped.
        """


class Shell:
    """One session and its screen. Use it from the main thread: Ctrl-C ends the running cell and nothing else."""

    def __init__(self, session: REPLProtocol, screen: Screen) -> None:
        self._session = session
        self._screen = screen
        self._names: frozenset[str] = frozenset()

    def converse(self, reader: CellReader) -> bool:
        """Read and run cells until the reader ends. Returns False if the session ended first."""
        while True:
            try:
                code = reader.read(self._names)
                if code.strip():
                    self.run(code)
                    self._on_a_thread(self._list_names)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return True
            except SessionClosed as exc:
                self._screen.complaint(f"the session is over: {exc}")
                return False

    def run_all(self, cells: Iterable[str]) -> bool:
        """Run piped cells, each with limits of its own. Returns whether the last one ran to its end.

        Raises:
            KeyboardInterrupt: Ctrl-C; the cell it came in was interrupted, and the others are not run.
        """
        ok = True
        for code in cells:
            try:
                result, interrupted = self.run(code)
            except SessionClosed as exc:
                self._screen.complaint(f"the session is over: {exc}")
                return False
            if interrupted:
                raise KeyboardInterrupt
            ok = result.ok
        return ok

    def run(self, code: str) -> tuple[ExecResult, bool]:
        """Run one cell and show what comes of it. Returns its result, and whether Ctrl-C came meanwhile.

        Raises:
            SessionClosed: the session is over.
        """
        self._screen.begin_cell(self._session.limits.output_bytes)
        result, interrupted = self._on_a_thread(lambda: self._exec(code))
        self._screen.result(result)
        return result, interrupted

    def _exec(self, code: str) -> ExecResult:
        try:
            return self._session.exec(code, on_output=self._screen.output)
        except ValueError as exc:  # the code itself cannot be sent; nothing ran
            return ExecResult(outcome="error", error=str(exc))

    def _list_names(self) -> None:
        """Remember the session's names for completion. It runs guest code, which may fail in any way."""
        try:
            found = self._session.names()
        except SessionClosed:
            raise
        except SandboxError as exc:
            self._screen.notice(f"the names could not be listed: {exc}")
            return
        usable = [name for name in found if name.isidentifier() and len(name) <= MAX_NAME_CHARS]
        self._names = frozenset(usable[:MAX_NAMES])

    def _on_a_thread(self, call: Callable[[], Any]) -> Any:
        """``call`` on a thread of its own, so that Ctrl-C arrives here and can end the cell by ``interrupt()``.

        Its result then says in which state the session is, which an exception would not.
        """
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put((call(), None))
            except BaseException as exc:  # noqa: BLE001 - carried to the thread that waits and raised there
                answers.put((None, exc))

        interrupted = threading.Event()

        def on_ctrl_c(_number: int, _frame: FrameType | None) -> None:
            interrupted.set()
            self._session.interrupt()

        # A handler and not KeyboardInterrupt, which could come between any two lines here and leave the call behind.
        before = signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            threading.Thread(target=work, name="rlm-sandbox-cell", daemon=True).start()
            value, failure = take(answers)
        finally:
            signal.signal(signal.SIGINT, before)
        if failure is not None:
            raise failure
        return value, interrupted.is_set()
