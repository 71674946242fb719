"""`Turnstile`: one call of a session at a time; the pool may hold it for a moment between calls, to park the session."""

from __future__ import annotations

import threading
import time

__all__ = ("Turnstile",)


class Turnstile:
    """Taken by a call with `enter`, by the pool with `enter_idle`; both give it back with `leave`."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._in_call = False

    def enter(self) -> bool:
        """Take the session for a call. False if another call has it; the pool, which may have it, is waited for."""
        while not self._busy.acquire(blocking=False):
            if self._in_call:
                return False
            time.sleep(0.0005)
        self._in_call = True
        return True

    def enter_idle(self) -> bool:
        """Take the session only if nobody has it."""
        return self._busy.acquire(blocking=False)

    def leave(self) -> None:
        """Give it back."""
        self._in_call = False
        self._busy.release()
