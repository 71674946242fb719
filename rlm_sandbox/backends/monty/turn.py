"""`Turn`: one cell's conversation with the interpreter: snapshots, host calls, sleeps, deadlines.

The calling thread waits on one mailbox for everything that can happen: the engine's answer, output, the end of a host
call, an interrupt, a deadline. Engine calls themselves run on the worker's thread, so that nothing blocks the caller.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final

import pydantic_monty as monty

from ...bridge.handles import HostCall, Outcome, run_call
from ...bridge.host_pool import HostPool
from ...results import OutputChunk, Stream
from .host_calls import Answer, HostDoor
from .pool import ENGINE, Worker

__all__ = ("Clock", "Turn", "TurnStopped")

log: Final = logging.getLogger("rlm_sandbox.output")

OUTPUT: Final = "output"
CALL: Final = "call"
STOP: Final = "stop"
#: What the interpreter has beyond its own time limit to say so itself, before it is killed.
GRACE_SECONDS: Final = 0.25
#: How long a killed worker may take to be noticed.
_DRAIN_SECONDS: Final = 5.0


class TurnStopped(Exception):
    """The host ends the cell: ``reason`` is a limit's name, ``interrupt`` or ``closed``; ``observed`` what was measured."""

    def __init__(self, reason: str, observed: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.observed = observed


@dataclass(slots=True)
class Clock:
    """Deadlines of a cell. ``time_seconds`` is the guest's; ``wall`` and ``session`` are points of `time.monotonic`."""

    time_seconds: float | None
    engine_seconds: float | None
    """The limit the interpreter itself knows; where it is the same, the interpreter gets the grace to report it."""
    wall: float | None
    session: float | None
    started: float
    guest_seconds: float = 0.0

    def wait(self, charged_since: float | None, grace: bool) -> tuple[float | None, str]:
        """Seconds until the next deadline, None for never, and which one it is."""
        now = time.monotonic()
        nearest, reason = math.inf, ""
        if charged_since is not None and self.time_seconds is not None:
            nearest = self.time_seconds - self.guest_seconds - (now - charged_since)
            nearest += GRACE_SECONDS if grace and self.engine_seconds == self.time_seconds else 0.0
            reason = "time_seconds"
        for point, name in ((self.wall, "wall_seconds"), (self.session, "session_seconds")):
            if point is not None and point - now < nearest:
                nearest, reason = point - now, name
        return (None if nearest == math.inf else max(0.0, nearest)), reason

    def spent(self, since: float) -> None:
        """Charge the guest for the time since ``since``."""
        self.guest_seconds += time.monotonic() - since

    def check(self) -> None:
        """Raise `TurnStopped` if the guest's time is used up."""
        if self.time_seconds is not None and self.guest_seconds > self.time_seconds:
            raise TurnStopped("time_seconds", self.guest_seconds)

    @property
    def elapsed(self) -> float:
        """Seconds of wall time since the start."""
        return time.monotonic() - self.started


class Turn:
    """One or more feeds under one clock and one budget of host calls."""

    def __init__(
        self,
        worker: Worker,
        door: HostDoor,
        pool: HostPool,
        clock: Clock,
        *,
        host_calls: int | None,
        known_names: Callable[[], list[str]],
        lazy: Callable[[str], str | None],
        on_output: Callable[[OutputChunk], None] | None = None,
    ) -> None:
        self._worker = worker
        self._door = door
        self._pool = pool
        self.clock = clock
        self._budget = host_calls
        self._known_names = known_names
        self._lazy = lazy
        self._on_output = on_output
        self._mailbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._in_engine = False
        self._waiting: dict[int, HostCall] = {}
        self._timers: dict[int, float] = {}
        self._settled: dict[int, Answer] = {}
        self.host_calls = 0
        #: No feed is running or suspended.
        self.idle = True

    # ---- from other threads

    def stop(self, reason: str) -> None:
        """End the cell. From any thread."""
        self._mailbox.put((STOP, reason))

    def post_output(self, stream: Stream, text: str) -> None:
        """Hand output to the calling thread. From the worker's thread."""
        self._mailbox.put((OUTPUT, stream, text))

    # ---- the conversation

    def run(self, start: Callable[[], Any]) -> Any:
        """Drive a feed to its end and return its value.

        Raises:
            TurnStopped: the host ended it; the worker must be given up with `abandon`.
            monty.MontyError: the guest's error, or the worker's death.
        """
        self.idle = False
        try:
            snapshot = self._engine(start)
            while not isinstance(snapshot, monty.MontyComplete):
                snapshot = self._engine(self._respond(snapshot))
        except (monty.MontyRuntimeError, monty.MontySyntaxError):
            self.idle = True
            raise
        self.idle = True
        return snapshot.output

    def abandon(self) -> None:
        """Kill the worker and wait until the engine has noticed. Never raises."""
        self._door.cancel_searches()
        self._worker.kill()
        deadline = time.monotonic() + _DRAIN_SECONDS
        while self._in_engine:
            try:
                if self._mailbox.get(timeout=max(0.0, deadline - time.monotonic()))[0] == ENGINE:
                    self._in_engine = False
            except Empty:
                return

    def _engine(self, step: Callable[[], Any]) -> Any:
        self._in_engine = True
        since = time.monotonic()
        self._worker.submit(step, self._mailbox)
        try:
            while (event := self._next(since, grace=True))[0] != ENGINE:
                continue
        finally:
            self.clock.spent(since)
        self._in_engine = False
        _, value, exc = event
        if exc is not None:
            raise exc
        return value

    def _next(self, charged_since: float | None, *, grace: bool = False, until: float | None = None) -> tuple[Any, ...]:
        """The next event; ``("timer",)`` when ``until`` comes first."""
        while True:
            timeout, reason = self.clock.wait(charged_since, grace)
            if until is not None and (timeout is None or until - time.monotonic() < timeout):
                timeout, reason = max(0.0, until - time.monotonic()), ""
            try:
                event = self._mailbox.get(timeout=timeout)
            except Empty:
                if not reason:
                    return ("timer",)
                seen = self.clock.elapsed
                if reason == "time_seconds" and charged_since is not None:
                    seen = self.clock.guest_seconds + time.monotonic() - charged_since
                raise TurnStopped(reason, seen) from None
            if event[0] == STOP:
                raise TurnStopped(event[1])
            if event[0] == OUTPUT:
                self._show(OutputChunk(event[1], event[2]))
                continue
            if event[0] == CALL:
                _, call_id, outcome = event
                call = self._waiting.pop(call_id, None)
                if call is not None:
                    self._settled[call_id] = self._door.answer(call, outcome)
            return event

    def _show(self, chunk: OutputChunk) -> None:
        if self._on_output is None:
            return
        try:
            self._on_output(chunk)
        except Exception:  # a listener's error must not cost the caller the cell's result
            log.exception("on_output raised; it is not called again in this cell")
            self._on_output = None

    # ---- snapshots

    def _respond(self, snapshot: Any) -> Callable[[], Any]:
        if isinstance(snapshot, monty.FunctionSnapshot):
            answer = self._operating_system(snapshot) if snapshot.is_os_function else self._function(snapshot)
            if answer is None:
                return snapshot.resume_not_handled
            return lambda: snapshot.resume(answer)  # type: ignore[arg-type]
        if isinstance(snapshot, monty.NameLookupSnapshot):
            return self._name(snapshot)
        assert isinstance(snapshot, monty.FutureSnapshot)
        settled = self._futures(snapshot.pending_call_ids)
        return lambda: snapshot.resume(settled)  # type: ignore[arg-type]

    def _function(self, snapshot: monty.FunctionSnapshot) -> Answer:
        if snapshot.object_id is None and snapshot.function_name == "_rlm_known":
            return {"return_value": self._known_names()}
        call = self._door.call(snapshot)
        if not isinstance(call, HostCall):
            return call
        return self._run(call, snapshot.call_id)

    def _run(self, call: HostCall, call_id: int) -> Answer:
        self.host_calls += 1
        if self._budget is not None and self.host_calls > self._budget:
            raise TurnStopped("host_calls", self.host_calls)
        if call.is_async:
            self._submit(call, call_id)
            return {"future": ...}
        since = time.monotonic()
        guest_work = self._door.is_guest_work(call)
        if call.inline or (guest_work and not self._door.is_search(call)):
            outcome = run_call(call)
            if guest_work:
                self.clock.spent(since)
                self.clock.check()
            return self._door.answer(call, outcome)
        self._submit(call, call_id)
        try:
            while call_id not in self._settled:
                self._next(since if guest_work else None)
        finally:
            if guest_work:
                self.clock.spent(since)
        return self._settled.pop(call_id)

    def _submit(self, call: HostCall, call_id: int) -> None:
        mailbox = self._mailbox
        self._waiting[call_id] = call

        def done(outcome: Outcome) -> None:
            mailbox.put((CALL, call_id, outcome))

        self._pool.submit(call, done)

    def _operating_system(self, snapshot: monty.FunctionSnapshot) -> Answer | None:
        name, args = snapshot.function_name, snapshot.args
        if name in ("time.sleep", "asyncio.sleep"):
            seconds = args[0] if args and isinstance(args[0], int | float) else 0.0
            due = time.monotonic() + (min(max(float(seconds), 0.0), 1e9) if seconds == seconds else 0.0)
            if name == "asyncio.sleep":
                self._timers[snapshot.call_id] = due
                return {"future": ...}
            since = time.monotonic()
            try:
                while self._next(since, until=due)[0] != "timer":
                    continue
            finally:
                self.clock.spent(since)
            return {"return_value": None}
        if name == "import":
            module = str(args[0])[:100] if args else ""
            return {
                "exc_type": "ModuleNotFoundError",
                "message": f"No module named {module!r} in this subset of Python; use a backend whose capabilities list 'imports'",
            }
        return None

    def _name(self, snapshot: monty.NameLookupSnapshot) -> Callable[[], Any]:
        if snapshot.object_id is None:
            text = self._lazy(snapshot.variable_name)
            return snapshot.resume if text is None else lambda: snapshot.resume(value=text)
        found = self._door.attribute(snapshot)
        if not isinstance(found, HostCall):
            return snapshot.resume if found is None else lambda: snapshot.resume(value=found)
        answer = self._run(found, -1)
        return lambda: snapshot.resume(value=answer["return_value"]) if "return_value" in answer else snapshot.resume()

    def _futures(self, pending: list[int]) -> dict[int, Answer]:
        """Wait until at least one of ``pending`` is settled. The guest pays only if it waits for nothing but its own timers."""
        while True:
            now = time.monotonic()
            for call_id in [key for key, due in self._timers.items() if due <= now]:
                del self._timers[call_id]
                self._settled[call_id] = {"return_value": None}
            settled = {key: self._settled.pop(key) for key in pending if key in self._settled}
            waiting = any(key in self._waiting for key in pending)
            if settled or not (waiting or any(key in self._timers for key in pending)):
                return settled
            until = min((self._timers[key] for key in pending if key in self._timers), default=None)
            try:
                self._next(None if waiting else now, until=until)
            finally:
                if not waiting:
                    self.clock.spent(now)
