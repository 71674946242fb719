"""What can end an engine call from outside while its thread is blocked in it: deadlines, and Ctrl-C.

An engine call cannot be interrupted, only its process killed. Making the call on a thread of its own, so that the caller
could wait for something else too, costs two switches of threads for every call; so the caller makes it itself, and these
watch over it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ("Alarms", "SignalWatch", "alarms", "signal_watch")


class Stoppable(Protocol):
    """A call that Ctrl-C ends."""

    def stop(self, reason: str) -> None: ...


class Alarms:
    """One thread that calls back when a deadline passes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[int, tuple[float, Callable[[], None]]] = {}
        self._ids = itertools.count()
        #: The thread looks again then. Taking an alarm back does not move it: the thread wakes once too often, and the
        #: next alarm, as far away as the last one was, needs not wake it.
        self._looks_at = 0.0
        self._started = False

    def arm(self, at: float, ring: Callable[[], None]) -> int:
        """Call ``ring`` at ``at``, of `time.monotonic`, on the alarms' thread. Returns the alarm's id."""
        key = next(self._ids)
        with self._changed:
            self._due[key] = (at, ring)
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="rlm-sandbox-alarms", daemon=True).start()
            elif at < self._looks_at:
                self._changed.notify()
        return key

    def disarm(self, key: int) -> None:
        """Take an alarm back. It may be ringing already."""
        self._due.pop(key, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                ringing = [(key, ring) for key, (at, ring) in list(self._due.items()) if at <= now]
                for key, _ in ringing:
                    self._due.pop(key, None)
                if not ringing:
                    self._looks_at = min((at for at, _ in list(self._due.values())), default=now + 3600.0)
                    self._changed.wait(min(self._looks_at - now, threading.TIMEOUT_MAX))
                    continue
            for _, ring in ringing:
                ring()


class SignalWatch:
    """Ctrl-C while the main thread is in an engine call, by `signal.set_wakeup_fd`.

    Python runs signal handlers on the main thread only, after the call; this sees the signal at once and stops the
    call. Bytes of other signals go on to the descriptor that was set before, if any.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._outer = -1
        self._call: Stoppable | None = None
        threading.Thread(target=self._run, name="rlm-sandbox-signals", daemon=True).start()

    def enter(self, call: Stoppable) -> Stoppable | None:
        """Watch over ``call``. Returns what `leave` needs. On the main thread only."""
        old = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if old != self._write:
            self._outer = old
        previous, self._call = self._call, call
        return previous

    def leave(self, previous: Stoppable | None) -> None:
        """Undo `enter`."""
        self._call = previous
        if previous is None:
            signal.set_wakeup_fd(self._outer)

    def _run(self) -> None:
        while True:
            numbers = os.read(self._read, 64)
            if self._outer >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._outer, numbers)
            call = self._call
            if call is not None and signal.SIGINT in numbers:
                call.stop("interrupt")


_lock: Final = threading.Lock()
_alarms: dict[int, Alarms] = {}
_watches: dict[int, SignalWatch] = {}


def alarms() -> Alarms:
    """The alarms of this process; a forked child gets its own, with a thread of its own."""
    found = _alarms.get(os.getpid())
    if found is None:
        with _lock:
            found = _alarms.setdefault(os.getpid(), Alarms())
    return found


def signal_watch() -> SignalWatch | None:
    """The watch of this process, on its main thread; None on others, where Python raises no signal."""
    if threading.get_ident() != threading.main_thread().ident:
        return None
    found = _watches.get(os.getpid())
    if found is None:
        found = _watches[os.getpid()] = SignalWatch()
    return found
