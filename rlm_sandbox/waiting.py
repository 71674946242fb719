"""Waits that Ctrl-C ends, whenever it comes.

Python runs a signal's handler between two bytecodes of the main thread. A signal that comes after the last of them and
before the wait's system call has begun does not end that wait, and neither does one that the kernel hands to another
thread: the handler runs when the wait is over. So on the main thread no wait of this library is longer than a piece;
elsewhere no handler runs, and a wait is made at once. `signal.set_wakeup_fd` would wake it, too, but belongs to the program.
"""

from __future__ import annotations

import math
import queue
import select
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ("PIECE_SECONDS", "is_readable", "piece", "take", "wait_until")

#: How late a signal may be noticed. A thread that waits for minutes wakes up as often, and does nothing else.
PIECE_SECONDS: Final = 0.2

_T = TypeVar("_T")


def piece(seconds: float | None) -> float | None:
    """How much of a wait of ``seconds`` (None: without end) may be waited at once on this thread."""
    if seconds is not None and seconds <= PIECE_SECONDS:
        return seconds
    return PIECE_SECONDS if threading.get_ident() == threading.main_thread().ident else seconds


def wait_until(wait: Callable[[float | None], bool], seconds: float | None = None) -> bool:
    """Call ``wait`` with the seconds to wait (None: without end) until it returns True, or ``seconds`` are over."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        part = piece(left)
        if wait(part):
            return True
        if part == left and left is not None:
            return False


def take(items: queue.SimpleQueue[_T], seconds: float | None = None) -> _T:
    """The next item.

    Raises:
        queue.Empty: none came within ``seconds``.
    """
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        part = piece(left)
        try:
            return items.get(timeout=part)
        except queue.Empty:
            if part == left:
                raise


def is_readable(fd: int, seconds: float = 0.0) -> bool:
    """Whether there is something to read, or the other side has ended; waits for it as long as this."""
    poll = select.poll()  # select() fails on descriptors above 1023
    poll.register(fd, select.POLLIN)
    return wait_until(lambda part: bool(poll.poll(None if part is None else math.ceil(part * 1000))), seconds)
