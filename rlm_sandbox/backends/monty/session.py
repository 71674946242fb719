"""`MontySession`: the REPL contract over an `Interpreter`."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import pydantic_monty as monty

from ...binding import Exposed
from ...bridge.capture import Capture
from ...bridge.host_pool import HostPool
from ...bridge.names import checked_name
from ...context import Context, WholeText
from ...errors import (
    GuestCrashed,
    GuestError,
    LimitExceeded,
    PoolTimeout,
    SandboxError,
    SessionBusy,
    SessionClosed,
    UnsendableValue,
)
from ...limits import Limits
from ...protocol import Capabilities
from ...registry import SessionConfig
from ...results import ExecResult, LimitHit, Outcome, OutputChunk, State, Stream, Usage
from ...wire.codec import ValueRefused
from . import values
from .cells import Cell, read_cell
from .host_calls import HostDoor
from .interpreter import OWN_NAMES, FeedEnded, Interpreter, Origin
from .pool import Slot
from .turn import Clock, Turn, TurnStopped
from .worker import MAX_DUMP_BYTES

__all__ = ("MontySession",)

#: Reasons of `TurnStopped` that are limits.
_LIMIT_FIELDS: Final = ("time_seconds", "wall_seconds", "session_seconds", "host_calls", "value_bytes")
_MAX_CHECKPOINTS: Final = 64
_AT_ITS_END: Final = "reached its session_seconds"


@dataclass(frozen=True, slots=True)
class _Bound:
    target: Any
    inline: bool
    errors: tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a feed came to, decided from what the host measured and not from what the guest said."""

    outcome: Outcome
    limit: LimitHit | None = None
    error: str | None = None
    traceback: str | None = None
    exit_status: int | None = None


@dataclass(frozen=True, slots=True)
class _Moment:
    """A session's state: of its interpreter, and what it can reach on the host."""

    interpreter: Origin
    door: HostDoor
    bindings: dict[str, _Bound]
    texts: dict[str, Context]


class MontySession:
    """See `REPLProtocol`, `SupportsFork` and `SupportsCheckpoint`."""

    def __init__(self, config: SessionConfig, slot: Slot, capabilities: Capabilities, origin: _Moment | None = None) -> None:
        self._config = config
        self._limits = config.limits
        self._setup = config.setup
        self._capabilities = capabilities
        self._pool = HostPool()
        self._door = HostDoor(config.limits.value_bytes)
        self._busy = threading.Lock()
        self._turn: Turn | None = None
        self._closed = ""
        seconds = config.limits.session_seconds
        self._ends_at = None if seconds is None else time.monotonic() + seconds
        self._bindings: dict[str, _Bound] = {}
        self._texts: dict[str, Context] = {}
        self._cell_names: frozenset[str] = frozenset()
        self._cells = 0
        #: Names that were lost in a call that could not report it.
        self._unreported: tuple[str, ...] | None = None
        self._slot = slot
        self._in_call = False
        self._checkpoints: dict[str, _Moment] = {}
        at = None if origin is None else origin.interpreter
        self._interpreter = Interpreter(slot, config.limits, recovery=config.recovery, origin=at)
        try:
            if origin is None:
                self._start()
            else:
                self._adopt(origin)
        except BaseException:
            self._end("could not be opened")
            raise
        park = weakref.WeakMethod(self._park)
        slot.park = lambda: (method := park()) is not None and method()

    # ---- the contract's small parts

    @property
    def capabilities(self) -> Capabilities:
        """See `REPLProtocol`."""
        return self._capabilities

    @property
    def limits(self) -> Limits:
        """The session's limits."""
        return self._limits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def interrupt(self) -> None:
        """See `REPLProtocol.interrupt`."""
        turn = self._turn
        if turn is not None:
            turn.stop("interrupt")

    def close(self) -> None:
        """See `REPLProtocol.close`."""
        self._closed = self._closed or "was closed"
        turn = self._turn
        if turn is not None:
            turn.stop("closed")
        # A call that is running sees that the session is closed when it ends, and frees everything.
        if self._take():
            try:
                self._end("was closed")
            finally:
                self._give()

    def reset(self) -> None:
        """See `REPLProtocol.reset`."""
        with self._entered():
            self._unreported = None
            try:
                self._renew()
            except BaseException:
                self._end("could not be reset")
                raise

    # ---- exec

    def exec(
        self,
        code: str,
        *,
        limits: Limits | None = None,
        read: tuple[str, ...] = (),
        on_output: Callable[[OutputChunk], None] | None = None,
    ) -> ExecResult:
        """See `REPLProtocol.exec`."""
        if not isinstance(code, str):
            raise TypeError(f"exec() takes source code as a str, not {type(code).__name__}")
        if isinstance(read, str):
            raise TypeError(f"exec(read=...) takes a tuple of names, not one string; write ({read!r},)")
        wanted = tuple(checked_name(name) for name in read)
        narrowed = self._limits.narrowed(limits)
        with self._entered():
            self._cells += 1
            cell = read_cell(code, self._door.operators)
            if cell.problem:
                protected = self._interpreter.protected
                result = ExecResult(outcome="error", error=cell.problem, traceback=f"{cell.problem}\n", protected=protected)
            else:
                result = self._exec(cell, code, narrowed, wanted, on_output)
            lost, self._unreported = self._unreported, None
            if lost is None:
                return result
            return dataclasses.replace(result, state="lost", lost_names=tuple(sorted({*lost, *result.lost_names})))

    def _exec(
        self, cell: Cell, code: str, limits: Limits, read: tuple[str, ...], on_output: Callable[[OutputChunk], None] | None
    ) -> ExecResult:
        capture = Capture(limits.output_bytes)
        clock = self._clock(limits)
        turn = self._new_turn(clock, limits, on_output)
        room = limits.output_bytes

        def listen(stream: Stream, text: str) -> None:
            nonlocal room
            capture.add(stream, text.encode("utf-8", "surrogatepass"))
            # The live view ends where the output's limit does.
            if on_output is not None and (room is None or room > 0):
                turn.show(stream, text)
                room = None if room is None else room - len(text)

        interpreter, protected, mark = self._interpreter, self._interpreter.protected, self._door.table.mark()
        value: str | None = None
        found: dict[str, Any] = {}
        verdict = _Verdict("ok")
        ended: FeedEnded | None = None
        self._cell_names, self._turn = cell.names, turn
        try:
            try:
                output = interpreter.feed(turn, cell.source, shown_as=(f"<cell {self._cells}>", code), listen=listen)
                value = _echo(output, cell)
            except FeedEnded as exc:
                verdict = self._verdict(exc, limits, clock)
                if verdict.outcome != "error":
                    raise
            interpreter.names |= cell.names
            found = interpreter.take(turn, read)
        except FeedEnded as exc:
            ended, verdict = exc, self._verdict(exc, limits, clock)
        except ValueRefused:
            ended = FeedEnded(None, TurnStopped("value_bytes"), idle=True)
            verdict = self._verdict(ended, limits, clock)
        except BaseException:
            # Ctrl-C: the cell is over, the session is not.
            self._turn = None
            turn.abandon()
            self._rebuild(mark)
            raise
        finally:
            self._turn, self._cell_names = None, frozenset()
        elapsed = clock.elapsed  # recovery is no part of the cell
        state: State = "kept"
        lost: tuple[str, ...] = ()
        if verdict.outcome in ("ok", "error") or (ended is not None and ended.idle):
            interpreter.protect()
        else:
            turn.abandon()
            state, lost = self._after_a_kill(verdict, mark)
        return ExecResult(
            outcome=verdict.outcome,
            stdout=capture.text("stdout") if capture.total else "",
            stderr=capture.text("stderr") if capture.total else "",
            value=value if verdict.outcome == "ok" else None,
            error=verdict.error,
            traceback=verdict.traceback,
            limit=verdict.limit,
            state=state,
            lost_names=lost,
            dropped_bytes=capture.dropped,
            read=found if verdict.outcome in ("ok", "error") else {},
            usage=Usage(
                time_seconds=clock.guest_seconds, wall_seconds=elapsed, output_bytes=capture.total, host_calls=turn.host_calls
            ),
            protected=protected,
        )

    def _verdict(self, ended: FeedEnded, limits: Limits, clock: Clock) -> _Verdict:
        if ended.stopped is not None:
            reason = ended.stopped.reason
            if reason not in _LIMIT_FIELDS:
                return _Verdict("interrupted", error="the cell was interrupted")
            return _limit(LimitHit(reason, float(getattr(limits, reason) or 0), ended.stopped.observed, "host"))
        ending = ended.ending
        assert ending is not None
        alive = self._interpreter.worker.alive
        if ending.kind == "memory" and limits.memory_mb is not None:
            # A process that died of it is the kernel's word; the interpreter's own refusal is the guest's side.
            observed = None if ending.observed_bytes is None else ending.observed_bytes / (1 << 20)
            return _limit(LimitHit("memory_mb", limits.memory_mb, observed, "guest" if alive else "kernel"))
        if ending.kind == "time" and limits.time_seconds is not None and clock.guest_seconds >= limits.time_seconds:
            return _limit(LimitHit("time_seconds", limits.time_seconds, clock.guest_seconds, "host"))
        if ending.kind == "died" or not alive:
            return _Verdict("crashed", error=ending.failure.text, exit_status=ending.exit_status)
        return _Verdict("error", error=self._door.own_words(ending.failure.text), traceback=ending.failure.traceback)

    def _after_a_kill(self, verdict: _Verdict, mark: int) -> tuple[State, tuple[str, ...]]:
        if verdict.limit is not None and verdict.limit.kind == "session_seconds":
            self._closed = self._closed or _AT_ITS_END
        if self._closed:  # `_entered` frees everything
            return "lost", tuple(sorted(self._interpreter.names))
        return self._rebuild(mark)

    # ---- values

    def get(self, name: str, default: Any = None) -> Any:
        """See `REPLProtocol.get`."""
        checked_name(name)
        with self._entered():
            with self._reading() as turn:
                found = self._interpreter.take(turn, (name,))
            if name not in found and name in self._texts:
                return self._texts[name].text
            return found.get(name, default)

    def set(self, name: str, value: Any) -> None:
        """See `REPLProtocol.set`."""
        _check_free(name)
        if isinstance(value, Context | Exposed | WholeText) or callable(value):
            raise TypeError(f"set() takes plain data; use bind({name!r}, ...) for functions and objects")
        try:
            sent = self._door.value(value)
        except ValueRefused as exc:
            raise UnsendableValue(f"{name} cannot be set: {exc}; send plain data, or bind an object with expose()") from None
        with self._entered():
            with self._reading() as turn:
                self._interpreter.feed(turn, "pass", inputs={name: sent})
            self._bindings.pop(name, None)
            self._texts.pop(name, None)
            self._door.unbind(name)
            self._interpreter.names.add(name)
            self._interpreter.protect()

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """See `REPLProtocol.bind`. ``context.whole`` larger than ``value_bytes`` is refused when the guest uses it."""
        _check_free(name)
        bound = _Bound(target, inline, errors)
        with self._entered():
            if isinstance(target, WholeText) and self._is_taken(name):
                try:
                    self._text(target.context)
                except TurnStopped as exc:
                    raise LimitExceeded("value_bytes", float(self._limits.value_bytes or 0), exc.observed) from None
            with self._reading() as turn:
                self._apply(turn, name, bound, fresh=not self._is_taken(name))
            self._bindings[name] = bound
            self._interpreter.names.discard(name)
            self._interpreter.protect()

    def names(self) -> dict[str, str]:
        """See `REPLProtocol.names`."""
        with self._entered():
            with self._reading() as turn:
                found = self._interpreter.feed(turn, "_rlm_summaries(locals())")
            own = OWN_NAMES - self._interpreter.names
            return {
                key[:200]: text[:200]
                for key, text in (found.items() if type(found) is dict else ())
                if type(key) is str and type(text) is str and key not in self._bindings and key not in own
            }

    # ---- calls and turns

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """One call at a time, on an open session whose interpreter lives."""
        if not self._take():
            if self._closed:
                raise SessionClosed(f"the session {self._closed}; open a new one")
            raise SessionBusy("the session is running another call; wait for it, or interrupt() it")
        try:
            if not self._closed and self._ends_at is not None and time.monotonic() >= self._ends_at:
                self._closed = _AT_ITS_END
            if not self._closed and not self._is_awake():
                # It died while nothing ran: there is a recovery point of this very state, or what was there is lost.
                state, lost = self._rebuild(0 if self._interpreter.protected else None)
                if state == "lost":
                    self._unreported = lost
            if self._closed:
                raise SessionClosed(f"the session {self._closed}; open a new one")
            yield
        finally:
            self._slot.used_at = time.monotonic()
            if self._closed:
                self._end(self._closed)
            self._give()

    def _take(self) -> bool:
        """Take the session for a call. False if another call has it; the pool, which may be parking it, has it for moments."""
        while not self._busy.acquire(blocking=False):
            if self._in_call:
                return False
            time.sleep(0.0005)
        self._in_call = True
        return True

    def _give(self) -> None:
        self._in_call = False
        self._busy.release()

    def _is_awake(self) -> bool:
        """Take a worker again if the session was parked. False if there is none that holds its state.

        Raises:
            PoolTimeout: all workers are busy.
        """
        interpreter = self._interpreter
        if not interpreter.parked:
            return interpreter.settle()
        try:
            return interpreter.wake()
        except PoolTimeout:
            raise
        except (monty.MontyError, OSError, RuntimeError):
            return False

    def _park(self) -> bool:
        """For the pool: give the worker up if no call is running."""
        if self._closed or not self._busy.acquire(blocking=False):
            return False
        try:
            return not self._closed and self._interpreter.park()
        finally:
            self._busy.release()

    def _clock(self, limits: Limits) -> Clock:
        now = time.monotonic()
        wall = None if limits.wall_seconds is None else now + limits.wall_seconds
        return Clock(limits.time_seconds, self._limits.time_seconds, wall, self._ends_at, now)

    def _new_turn(self, clock: Clock, limits: Limits, on_output: Callable[[OutputChunk], None] | None = None) -> Turn:
        return Turn(
            self._interpreter.worker,
            self._door,
            self._pool,
            clock,
            host_calls=limits.host_calls,
            known_names=lambda: sorted(self._interpreter.names | self._cell_names),
            lazy=lambda name: self._text(self._texts[name]) if name in self._texts else None,
            pool_id=id(self._slot.pool),
            on_output=on_output,
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Turn]:
        """A turn of a call that returns a plain value: what goes wrong is raised.

        Raises:
            GuestError, LimitExceeded, GuestCrashed, SessionClosed.
        """
        clock = self._clock(self._limits)
        turn = self._new_turn(clock, self._limits)
        mark = self._door.table.mark()
        self._turn = turn
        try:
            yield turn
        except ValueRefused:
            limit = self._limits.value_bytes
            raise LimitExceeded("value_bytes", float(limit if limit is not None else values.MAX_FRAME_BYTES)) from None
        except FeedEnded as exc:
            self._turn = None
            verdict = self._verdict(exc, self._limits, clock)
            state: State = "kept"
            if verdict.outcome != "error":
                turn.abandon()
                state, lost = self._after_a_kill(verdict, mark)
                if state == "lost":
                    self._unreported = lost
            raise _as_exception(verdict, state) from None
        except BaseException:
            self._turn = None
            if not turn.idle:  # Ctrl-C; an error of the host's own, a target that cannot be bound, leaves it idle
                turn.abandon()
                self._rebuild(mark)
            raise
        finally:
            self._turn = None

    def _text(self, context: Context) -> str:
        """A context's whole text for the guest.

        Raises:
            TurnStopped: it is larger than ``value_bytes``, or than a frame, or has lone surrogates.
        """
        limit = min(self._limits.value_bytes or values.MAX_FRAME_BYTES, values.MAX_FRAME_BYTES)
        if len(context) > limit:
            raise TurnStopped("value_bytes", len(context))
        try:
            sent = self._door.value(context.text)
        except ValueRefused:
            raise TurnStopped("value_bytes", len(context)) from None
        assert isinstance(sent, str)
        return sent

    # ---- the life of the interpreter

    def _start(self) -> None:
        """Prepare a fresh interpreter: intrinsics, setup, bindings.

        Raises:
            GuestError, LimitExceeded, GuestCrashed: it failed. The worker is not closed.
        """
        clock = self._clock(self._limits)
        turn = self._new_turn(clock, self._limits)
        self._turn = turn
        try:
            if self._setup:
                cell = read_cell(self._setup, {})
                if cell.problem:
                    raise _as_exception(_Verdict("error", error=cell.problem), "kept")
                self._interpreter.feed(turn, cell.source, shown_as=("<setup>", self._setup))
                self._interpreter.names |= cell.names
            for name, bound in self._bindings.items():
                self._apply(turn, name, bound, fresh=True)
                self._interpreter.names.discard(name)
        except FeedEnded as exc:
            verdict = self._verdict(exc, self._limits, clock)
            turn.abandon()
            raise _as_exception(verdict, "lost") from None
        finally:
            self._turn = None
        self._interpreter.protect()

    def _renew(self) -> None:
        self._interpreter.renew()
        self._door.clear()
        self._start()

    def _rebuild(self, mark: int | None) -> tuple[State, tuple[str, ...]]:
        """Replace a dead or distrusted interpreter: from the recovery point, or empty if ``mark`` is None or there is none.

        ``mark``: of the handle table; what was given out since belongs to the interpreter that is gone.
        """
        lost = tuple(sorted(self._interpreter.names))
        try:
            if mark is not None and self._interpreter.restore():
                if mark:
                    self._door.forget_since(mark)
                return "restored", ()
            self._renew()
        except (SandboxError, monty.MontyError, OSError, RuntimeError):
            self._closed = self._closed or "could not be rebuilt after a failure"
        return "lost", lost

    def _end(self, reason: str) -> None:
        self._closed = self._closed or reason
        self._interpreter.close()
        self._door.clear()
        self._pool.close()
        self._texts.clear()
        self._checkpoints.clear()

    # ---- copies of the state

    def fork(self) -> MontySession:
        """See `SupportsFork.fork`. The copy has the same host objects; its ``session_seconds`` begin now.

        Raises:
            LimitExceeded: the heap is too large to be copied.
            PoolTimeout: every worker is running a cell.
        """
        with self._entered():
            moment = self._moment()
        slot = self._slot.pool.slot()
        try:
            return MontySession(self._config, slot, self._capabilities, moment)
        except (monty.MontyError, OSError, RuntimeError) as exc:
            slot.release()
            raise GuestCrashed(f"the session could not be copied ({type(exc).__name__}); it is unchanged", state="kept") from exc
        except BaseException:
            slot.release()
            raise

    def checkpoint(self) -> str:
        """See `SupportsCheckpoint.checkpoint`. Kept in the host's memory; beyond 64 the oldest goes.

        Raises:
            LimitExceeded: the heap is too large to be copied.
        """
        with self._entered():
            key = secrets.token_hex(8)
            self._checkpoints[key] = self._moment()
            if len(self._checkpoints) > _MAX_CHECKPOINTS:
                del self._checkpoints[next(iter(self._checkpoints))]
            return key

    def restore(self, checkpoint: str) -> None:
        """See `SupportsCheckpoint.restore`. Bindings go back too.

        Raises:
            ValueError: there is no such checkpoint of this session.
            GuestCrashed: it could not be loaded; the session is empty.
        """
        with self._entered():
            moment = self._checkpoints.get(checkpoint)
            if moment is None:
                raise ValueError("there is no such checkpoint of this session; take one with checkpoint()")
            self._unreported = None
            if not self._interpreter.go_to(moment.interpreter.point):
                self._rebuild(None)
                raise GuestCrashed("the checkpoint could not be loaded; the session is empty", state="lost")
            self._door.clear()
            self._adopt(moment)

    def _moment(self) -> _Moment:
        origin = self._interpreter.origin()
        if origin is None:
            raise LimitExceeded("value_bytes", float(MAX_DUMP_BYTES))
        return _Moment(origin, self._door.copy(), dict(self._bindings), dict(self._texts))

    def _adopt(self, moment: _Moment) -> None:
        self._door = moment.door.copy()
        self._bindings = dict(moment.bindings)
        self._texts = dict(moment.texts)

    # ---- binding

    def _is_taken(self, name: str) -> bool:
        """True if ``name`` may have a value in the guest."""
        return name in self._bindings or name in self._interpreter.names

    def _apply(self, turn: Turn, name: str, bound: _Bound, *, fresh: bool) -> None:
        """Give a name its host object in the present interpreter. ``fresh``: the name has no value there."""
        target = bound.target
        if isinstance(target, WholeText):
            self._door.unbind(name)
            self._texts[name] = target.context
            if not fresh:  # a name without a value asks for the text on its first use
                self._interpreter.feed(turn, "pass", inputs={name: self._text(target.context)})
            return
        value = self._door.bind(name, target, bound.inline, bound.errors)
        self._texts.pop(name, None)
        self._interpreter.feed(turn, "pass", inputs={name: value})


def _limit(hit: LimitHit) -> _Verdict:
    return _Verdict("limit", limit=hit, error=f"the {hit.kind} limit of {hit.limit:g} was hit")


def _as_exception(verdict: _Verdict, state: State) -> SandboxError:
    """A verdict for a call that raises."""
    hit = verdict.limit
    if hit is not None:
        if hit.kind == "session_seconds":
            return SessionClosed(f"the session {_AT_ITS_END}; open a new one")
        return LimitExceeded(hit.kind, hit.limit, hit.observed)
    if verdict.outcome == "error":
        type_name, _, message = (verdict.error or "").partition(": ")
        return GuestError(type_name, message, verdict.traceback or "")
    return GuestCrashed(f"{verdict.error}; the session's state is {state}", exit_status=verdict.exit_status, state=state)


def _echo(output: Any, cell: Cell) -> str | None:
    if output is None or (cell.echoes and isinstance(output, str)):
        return output
    # The cell was not read on the host (too long, or newer syntax): its value is the engine's, not a repr.
    return repr(output) if type(output) in (bool, float, str, bytes, list, dict, tuple, set) else str(output)[:4_000]


def _check_free(name: str) -> None:
    if checked_name(name).startswith("_rlm"):
        raise ValueError(f"{name!r} is reserved; choose another name")
