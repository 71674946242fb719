"""What makes a busy cell look up: one thread that flags cells whose time has come, and a signal on the main thread.

The thread needs the interpreter's lock, which a long C call may hold for ever. Calls that look for signals (regular
expressions, big numbers) are ended on the main thread by a timer of the kernel's, which counts the process's CPU time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

__all__ = ("Alarm", "signals")

_TIMER_SECONDS: Final = 0.02
_IDLE_SECONDS: Final = 60.0


class Alarm:
    """Calls back when a cell's next deadline has come, from a thread of its own, started on demand."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over: in a forked child of the host there is no thread, and no cell."""
        self._changed = threading.Condition()
        self._due: dict[object, tuple[Callable[[], float | None], float]] = {}
        self._running = False
        self._wakes_at = 0.0

    @contextmanager
    def watching(self, look: Callable[[], float | None]) -> Iterator[None]:
        """While this lasts, ``look`` is called when the time it returned last (of `time.monotonic`) has come; None: never again."""
        key = object()
        due = look()
        if due is not None:
            with self._changed:
                self._due[key] = (look, due)
                if not self._running:
                    self._running = True
                    threading.Thread(target=self._run, name="rlm-sandbox-alarm", daemon=True).start()
                elif due < self._wakes_at:
                    self._changed.notify()
        try:
            yield
        finally:
            if due is not None:
                with self._changed:
                    self._due.pop(key, None)

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for key, (look, due) in list(self._due.items()):
                    if due <= now:
                        later = look()
                        if later is None:
                            del self._due[key]
                        else:
                            self._due[key] = (look, later)
                idle = not self._due
                self._wakes_at = min((due for _, due in self._due.values()), default=now + _IDLE_SECONDS)
                self._changed.wait(max(0.001, self._wakes_at - time.monotonic()))
                if idle and not self._due and time.monotonic() >= self._wakes_at:
                    self._running = False
                    return


ALARM: Final = Alarm()
os.register_at_fork(after_in_child=ALARM.forget)


@contextmanager
def signals(on_timer: Callable[[FrameType | None], None], on_interrupt: Callable[[], None]) -> Iterator[None]:
    """On the main thread: call ``on_timer`` with the frame that runs, every 20 ms of the process's CPU time, and ``on_interrupt`` at Ctrl-C.

    Both may raise into what runs. Elsewhere, and where the host uses that timer or handles Ctrl-C itself, nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    restore: list[tuple[int, Any]] = []
    timer = getattr(signal, "ITIMER_VIRTUAL", None)
    if timer is not None and signal.getitimer(timer)[0] != 0:
        timer = None

    def tick(number: int, frame: FrameType | None) -> None:
        on_timer(frame)

    def interrupt(number: int, frame: FrameType | None) -> None:
        on_interrupt()

    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            restore.append((signal.SIGINT, signal.default_int_handler))
            signal.signal(signal.SIGINT, interrupt)
        if timer is not None:
            restore.append((signal.SIGVTALRM, signal.getsignal(signal.SIGVTALRM)))
            signal.signal(signal.SIGVTALRM, tick)
            signal.setitimer(timer, _TIMER_SECONDS, _TIMER_SECONDS)
        yield
    finally:
        if timer is not None:
            signal.setitimer(timer, 0)
        for number, handler in restore:
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
