"""`Cell`: one call into a session: its clock, its budget of host calls, what ends it, and its output."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Final, NoReturn

from ...bridge.capture import Capture
from ...bridge.handles import HostCall, Outcome, run_call
from ...bridge.host_pool import HostPool
from ...bridge.watchdog import Watchdog
from ...limits import Limits
from ...results import LimitHit
from ...waiting import piece
from .alarm import ALARM, signals
from .policy.runtime import Policy

__all__ = ("Cell", "CellStopped")

_OUTPUT: Final = ("stdout", "stderr")
#: How often a cell is looked at, at most, whose deadline comes nearer only when the host has answered.
_LOOK_SECONDS: Final = 0.02
_OWN_FILES: Final = __file__.rpartition("backends")[0]


class CellStopped(BaseException):
    """Ends a cell. Raised again at its next loop, call or handler for as long as it goes on."""


class Cell:
    """Runs guest code on the calling thread, and ends it. Made for one call and thrown away."""

    def __init__(self, policy: Policy, pool: HostPool, limits: Limits, session_until: float | None, capture: Capture) -> None:
        self._policy = policy
        self._pool = pool
        self._limits = limits
        self._capture = capture
        self._started = time.monotonic()
        self._watchdog = Watchdog(limits, self._started, session_until)
        self._lock = threading.RLock()
        self._mailbox: SimpleQueue[Outcome | None] = SimpleQueue()
        self._thread = threading.get_ident()
        self._in_guest = False
        self._inline = False
        self.interrupted = False
        self.host_interrupted = False
        self.host_calls = 0

    # ---- what came of it

    @property
    def hit(self) -> LimitHit | None:
        """The limit that ended it."""
        return self._watchdog.hit

    @property
    def stopped(self) -> bool:
        """Whether the host ended it."""
        return self._watchdog.ending

    @property
    def guest_seconds(self) -> float:
        """The guest's clock."""
        return self._watchdog.turn_seconds(time.monotonic(), None)

    @property
    def wall_seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    # ---- ending it

    def stop(self, hit: LimitHit | None = None, *, from_host: bool = False) -> None:
        """End it: at a limit, or by an interrupt. From any thread."""
        with self._lock:
            if not self._watchdog.ending:
                self._watchdog.end(time.monotonic(), hit)
                self.interrupted = hit is None
            self.host_interrupted = self.host_interrupted or from_host
            self._policy.stop = True
        self._mailbox.put(None)

    def halt(self) -> NoReturn:
        """What a cell that was stopped runs into."""
        raise CellStopped

    def _look(self) -> float | None:
        """Compare the clock with the deadlines; returns when to look again, None if nothing will ever come."""
        now = time.monotonic()
        with self._lock:
            if not self._watchdog.ending and self._watchdog.check(now, None) != "go_on":
                self._policy.stop = True
                self._mailbox.put(None)
            if self._watchdog.ending:
                return None
            wait = self._watchdog.wait_seconds(now)
            if self._limits.time_seconds is not None:
                # While the host has the turn the guest's clock has no deadline, and will have one again: no sooner than this.
                left = max(_LOOK_SECONDS, self._limits.time_seconds - self._watchdog.turn_seconds(now, None))
                wait = left if wait is None else min(wait, left)
        return None if wait is None else now + max(wait, 0.001)

    def _on_timer(self, frame: FrameType | None) -> None:
        self._look()
        if self._in_guest and self._watchdog.ending and self._is_ours(frame):
            raise CellStopped

    def _is_ours(self, frame: FrameType | None) -> bool:
        """Whether what runs was called by the cell, or is this package on its behalf: not a hook of the host's, say."""
        if frame is not None and frame.f_code.co_filename.startswith(_OWN_FILES):
            return True
        while frame is not None and frame.f_globals is not self._policy.names:
            frame = frame.f_back
        return frame is not None

    def _on_interrupt(self) -> None:
        self.stop(from_host=True)
        if self._inline:
            raise KeyboardInterrupt
        if self._in_guest:
            raise CellStopped

    # ---- running it

    def run(self, step: Callable[[], Any]) -> Any:
        """Run guest code. Raises whatever it raises, `CellStopped` if it was ended."""
        self._policy.stop = False
        self._watchdog.guest_turn(time.monotonic(), None)
        try:
            with ALARM.watching(self._look), signals(self._on_timer, self._on_interrupt):
                try:
                    self._in_guest = True
                    return step()
                finally:
                    self._in_guest = False
        finally:
            self._in_guest = False
            self._watchdog.host_turn(time.monotonic(), None)
            self._policy.stop = True  # what outlives the cell (a finalizer, a callback) ends at its first step

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Nothing is raised into what runs here; the guest runs into it afterwards."""
        before, self._in_guest = self._in_guest, False
        try:
            yield
        finally:
            self._in_guest = before
        if self._policy.stop:
            raise CellStopped

    def write(self, stream: str, text: str) -> None:
        """Take output."""
        if threading.get_ident() != self._thread:
            return
        with self.shielded():
            self._capture.add(
                "stdout" if stream == _OUTPUT[0] else "stderr", str.encode(text, "utf-8", "backslashreplace")
            )  # not its own

    def sleep(self, seconds: float) -> None:
        """``time.sleep``: on the guest's clock."""
        until = time.monotonic() + float(seconds)
        with self.shielded():
            while (left := until - time.monotonic()) > 0 and not self.stopped:
                self._wait(left)

    def call(self, call: HostCall) -> Outcome:
        """Run a host call; the guest's clock stands still meanwhile.

        Raises:
            CellStopped: the cell ends first; a late answer is dropped.
        """
        self.host_calls += 1
        if self._limits.host_calls is not None and self.host_calls > self._limits.host_calls:
            self.stop(LimitHit("host_calls", self._limits.host_calls, self.host_calls, "host"))
        with self.shielded():
            if self.stopped:
                raise CellStopped
            with self._lock:
                self._watchdog.host_turn(time.monotonic(), None)
            try:
                return self._run_inline(call) if call.inline else self._run_pooled(call)
            finally:
                with self._lock:
                    self._watchdog.guest_turn(time.monotonic(), None)

    def _run_inline(self, call: HostCall) -> Outcome:
        self._inline = True
        try:
            return run_call(call)
        except KeyboardInterrupt:
            self.stop(from_host=True)
            raise CellStopped from None
        finally:
            self._inline = False

    def _run_pooled(self, call: HostCall) -> Outcome:
        mine: list[Outcome] = []

        def done(outcome: Outcome) -> None:
            mine.append(outcome)
            self._mailbox.put(outcome)

        self._pool.submit(call, done)
        while not mine and not self.stopped:
            self._wait(None)
        if self.stopped:
            self._pool.drop_queued()
            raise CellStopped
        return mine[0]

    def _wait(self, seconds: float | None) -> None:
        """Until something happens, a deadline comes, or ``seconds`` are over."""
        due = self._look()
        timeout = None if due is None else max(0.0, due - time.monotonic())
        if seconds is not None:
            timeout = seconds if timeout is None else min(timeout, seconds)
        with contextlib.suppress(Empty):
            self._mailbox.get(timeout=piece(timeout))
