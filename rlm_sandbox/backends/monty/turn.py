"""`Turn`: one cell's conversation with the interpreter: snapshots, host calls, sleeps, deadlines.

The calling thread makes the engine calls itself; between them it waits on one mailbox for what can happen: the end of a
host call, an interrupt, a deadline. While it is in an engine call, `alarms` watches over it, and what ends the call kills
the worker.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final

import pydantic_monty as monty

from ...bridge.handles import HostCall, Outcome, run_call
from ...bridge.host_pool import HostPool
from ...results import OutputChunk, Stream
from ...waiting import take
from . import values
from .alarms import alarms, signal_watch
from .host_calls import Answer, HostDoor
from .pool import INSIDE
from .remedy import missing_module
from .worker import Worker

__all__ = ("Clock", "EngineFailed", "Turn", "TurnStopped")

log: Final = logging.getLogger("rlm_sandbox.output")

CALL: Final = "call"
STOP: Final = "stop"
#: What the interpreter has beyond its own time limit to say so itself, before it is killed.
GRACE_SECONDS: Final = 0.25
#: Arguments that the host holds for calls that have not ended. A call beyond it waits for others to end.
MAX_PENDING_BYTES: Final = 64 << 20


class TurnStopped(Exception):
    """The host ends the cell: ``reason`` is a limit's name, ``interrupt`` or ``closed``; ``observed`` what was measured."""

    def __init__(self, reason: str, observed: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.observed = observed


class EngineFailed(Exception):
    """An engine call raised ``error``: never an exception of the host's own code, whose text the guest may not see."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


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

    def due(self, charged_since: float | None, grace: bool) -> tuple[float, str]:
        """The next deadline, infinite for none, and which one it is."""
        nearest, reason = math.inf, ""
        if charged_since is not None and self.time_seconds is not None:
            nearest, reason = charged_since + self.time_seconds - self.guest_seconds, "time_seconds"
            if grace and self.engine_seconds == self.time_seconds:
                nearest += GRACE_SECONDS
        if self.wall is not None and self.wall < nearest:
            nearest, reason = self.wall, "wall_seconds"
        if self.session is not None and self.session < nearest:
            nearest, reason = self.session, "session_seconds"
        return nearest, reason

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
        pool_id: int,
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
        self._inside = INSIDE.get() | {pool_id}
        self._watch = signal_watch()
        self._alarms = alarms()
        self._mailbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._lock = threading.Lock()
        self._in_engine = False
        #: The deadline of the running call, which one it is, and since when the guest pays.
        self._due = (math.inf, "", 0.0)
        #: The alarm that is set and when it rings: at the deadline of the running call, or of an earlier one. Deadlines
        #: move on while host calls run, so that one alarm does for many calls.
        self._alarm: int | None = None
        self._alarm_at = math.inf
        self._stopped: TurnStopped | None = None
        self._raised: BaseException | None = None
        self._waiting: dict[int, HostCall] = {}
        self._held: dict[int, int] = {}
        self._held_bytes = 0
        self._timers: dict[int, float] = {}
        self._settled: dict[int, Answer] = {}
        self.host_calls = 0
        #: No feed is running or suspended.
        self.idle = True

    # ---- from other threads

    def stop(self, reason: str) -> None:
        """End the cell. From any thread."""
        with self._lock:
            self._end(TurnStopped(reason))
        self._mailbox.put((STOP, reason))

    def _end(self, stopped: TurnStopped) -> None:
        """No engine call goes on or begins any more. Under the lock; the first reason stands."""
        if self._stopped is None:
            self._stopped = stopped
            if self._in_engine:
                self._worker.kill()

    def show(self, stream: Stream, text: str) -> None:
        """Hand output to the listener. On the calling thread, inside an engine call, which nothing may be raised through."""
        if self._on_output is None:
            return
        try:
            self._on_output(OutputChunk(stream, text))
        except Exception:  # a listener's error must not cost the caller the cell's result
            log.exception("on_output raised; it is not called again in this cell")
            self._on_output = None
        except BaseException as exc:  # noqa: BLE001 - Ctrl-C, raised again when the engine call has ended
            self._raised = exc
            self._on_output = None
            self.stop("interrupt")

    # ---- the conversation

    def run(self, start: Callable[[], Any]) -> Any:
        """Drive a feed to its end and return its value.

        Raises:
            TurnStopped: the host ended it; the worker must be given up with `abandon`.
            EngineFailed: the guest's error, or the worker's death.
        """
        self.idle = False
        try:
            snapshot = self._engine(start)
            while not isinstance(snapshot, monty.MontyComplete):
                snapshot = self._engine(self._respond(snapshot))
        except EngineFailed as exc:
            self.idle = isinstance(exc.error, monty.MontyRuntimeError | monty.MontySyntaxError)
            raise
        finally:
            self._disarm()
        self.idle = True
        return snapshot.output

    def abandon(self) -> None:
        """Kill the worker and end what it was waiting for. Never raises."""
        self._door.cancel_searches()
        self._worker.kill()

    def _engine(self, step: Callable[[], Any]) -> Any:
        clock, watch = self.clock, self._watch
        since = time.monotonic()
        at, reason = clock.due(since, grace=True)
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            self._in_engine = True
            self._due = (at, reason, since)
            if at < self._alarm_at:
                self._arm(at)
        previous = None if watch is None else watch.enter(self)
        value, failed = None, None
        try:
            value = step()
        except Exception as exc:  # noqa: BLE001 - raised below, unless the call was ended from outside
            failed = exc
        finally:
            self._in_engine = False
            if watch is not None:
                watch.leave(previous)
            clock.spent(since)
        if self._raised is not None:
            raise self._raised
        if self._stopped is not None:
            raise self._stopped
        if failed is not None:
            raise EngineFailed(failed)
        return value

    def _arm(self, at: float) -> None:
        """Under the lock."""
        if self._alarm is not None:
            self._alarms.disarm(self._alarm)
        self._alarm, self._alarm_at = self._alarms.arm(at, self._ring), at

    def _disarm(self) -> None:
        with self._lock:
            if self._alarm is not None:
                self._alarms.disarm(self._alarm)
            self._alarm, self._alarm_at = None, math.inf

    def _ring(self) -> None:
        with self._lock:
            self._alarm, self._alarm_at = None, math.inf
            if not self._in_engine or self._stopped is not None:
                return  # the next call sets another
            at, reason, since = self._due
            now = time.monotonic()
            if now < at:
                self._arm(at)
                return
            clock = self.clock
            self._end(TurnStopped(reason, clock.guest_seconds + now - since if reason == "time_seconds" else clock.elapsed))

    def _next(self, charged_since: float | None, *, until: float | None = None) -> tuple[Any, ...]:
        """The next event; ``("timer",)`` when ``until`` comes first."""
        while True:
            at, reason = self.clock.due(charged_since, grace=False)
            if until is not None and until < at:
                at, reason = until, ""
            try:
                event = take(self._mailbox, None if at == math.inf else max(0.0, at - time.monotonic()))
            except Empty:
                if not reason:
                    return ("timer",)
                seen = self.clock.elapsed
                if reason == "time_seconds" and charged_since is not None:
                    seen = self.clock.guest_seconds + time.monotonic() - charged_since
                raise TurnStopped(reason, seen) from None
            if event[0] == STOP:
                raise TurnStopped(event[1])
            if event[0] == CALL:
                _, call_id, outcome = event
                call = self._waiting.pop(call_id, None)
                self._held_bytes -= self._held.pop(call_id, 0)
                if call is not None:
                    self._settled[call_id] = self._door.answer(call, outcome)
            return event

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
            size = values.weight(call.args) + values.weight(call.kwargs)
            while self._held and self._held_bytes + size > MAX_PENDING_BYTES:
                self._next(None)
            self._held[call_id] = size
            self._held_bytes += size
            self._submit(call, call_id)
            return {"future": ...}
        since = time.monotonic()
        guest_work = self._door.is_guest_work(call)
        if call.inline or (guest_work and not self._door.is_search(call)):
            token = INSIDE.set(self._inside)
            try:
                outcome = run_call(call)
            finally:
                INSIDE.reset(token)
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

        token = INSIDE.set(self._inside)  # the pool copies the context
        try:
            self._pool.submit(call, done)
        finally:
            INSIDE.reset(token)

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
            return {"exc_type": "ModuleNotFoundError", "message": missing_module(module)}
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
