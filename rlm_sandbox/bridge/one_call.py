"""`OneCall`: who has the session, of which one call at a time may.

A lock would do, but for signals: a handler's exception (Ctrl-C) can be raised between any two bytecodes of the main thread, so also when a
lock is taken and the ``try`` that gives it back has not begun, or has just ended. Then nobody would ever give it back. So what is taken
is marked with the frame that took it: a mark whose frame has been left is void.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final

__all__ = ("Call", "Mark", "OneCall")

_SLOT: Final = "call"


class Mark:
    """One call: the frame that makes it, which runs on this thread."""

    __slots__ = ("frame", "thread")

    def __init__(self, frame: FrameType) -> None:
        self.frame: FrameType | None = frame
        self.thread = threading.get_ident()

    def is_void(self) -> bool:
        """Whether its frame has been left. Of another thread's frame that cannot be told, and is not said."""
        if self.thread != threading.get_ident():
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return False
            frame = frame.f_back
        return True


class Call(Mark):
    """``with`` one call of a session. Written out, because a generator would cost as much as the rest of a call's checks."""

    __slots__ = ("_enter", "_leave")

    def __init__(self, frame: FrameType, enter: Callable[[Mark], None], leave: Callable[[Mark], None]) -> None:
        super().__init__(frame)
        self._enter = enter
        self._leave = leave

    def __enter__(self) -> None:
        self._enter(self)

    def __exit__(self, *_exc: object) -> None:
        self._leave(self)


class OneCall:
    """Taken by a call, and given back by it."""

    def __init__(self) -> None:
        self._taken: dict[str, Mark] = {}

    def take(self, mark: Mark) -> bool:
        """False if another call has it. Whatever is raised here, `give_back` undoes it."""
        holder = self._taken.setdefault(_SLOT, mark)  # one step, for threads and signal handlers alike
        if holder is mark:
            return True
        if not holder.is_void():
            return False
        self._taken[_SLOT] = mark  # only the thread that left it comes here
        return True

    def give_back(self, mark: Mark) -> None:
        """If ``mark`` has it. The frame is let go of."""
        if self._taken.get(_SLOT) is mark:
            del self._taken[_SLOT]
        mark.frame = None
