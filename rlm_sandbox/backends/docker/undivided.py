"""`Undivided`: a piece of work on a stream that Ctrl-C does not cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ("Undivided",)


class Undivided:
    """``with`` this, Ctrl-C is raised when the block is over: half a frame on a stream would cost the session its container.

    On the main thread, where Python runs the handlers of signals; elsewhere it does nothing. Blocks may nest.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1 or threading.get_ident() != threading.main_thread().ident:
            return
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_exc: object) -> None:
        self._depth -= 1
        if self._depth or self._handler is None:
            return
        handler, self._handler = self._handler, None
        signal.signal(signal.SIGINT, handler)
        came, self._came = self._came, None
        if came is not None:
            handler(*came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = (number, frame)
