"""`MontySession`: the REPL contract over an `Interpreter`."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Self

import pydantic_monty as monty

from ...bridge.arguments import checked_read
from ...bridge.host_pool import HostPool
from ...bridge.names import checked_name
from ...errors import (
    GuestCrashed,
    LimitExceeded,
    PoolTimeout,
    SandboxError,
    SessionBusy,
    SessionClosed,
)
from ...limits import Limits
from ...protocol import Capabilities
from ...registry import SessionConfig
from ...results import ExecResult, OutputChunk, State, Usage
from ...wire.codec import ValueRefused
from . import values
from .bindings import Bindings, Bound, Moment, check_free
from .cells import Cell, read_cell
from .interpreter import FeedEnded, Interpreter
from .output import CellOutput
from .pool import Slot
from .turn import Clock, Turn, TurnStopped
from .turnstile import Turnstile
from .verdict import AT_ITS_END, Verdict, as_exception, judge
from .worker import MAX_DUMP_BYTES

__all__ = ("MontySession",)

_MAX_CHECKPOINTS: Final = 64


class MontySession:
    """See `REPLProtocol`, `SupportsFork` and `SupportsCheckpoint`."""

    def __init__(self, config: SessionConfig, slot: Slot, capabilities: Capabilities, origin: Moment | None = None) -> None:
        self._config = config
        self._limits = config.limits
        self._setup = config.setup
        self._capabilities = capabilities
        self._pool = HostPool()
        self._bindings = Bindings(config.limits.value_bytes)
        self._turnstile = Turnstile()
        self._turn: Turn | None = None
        self._closed = ""
        seconds = config.limits.session_seconds
        self._ends_at = None if seconds is None else time.monotonic() + seconds
        self._cell_names: frozenset[str] = frozenset()
        self._cells = 0
        #: Names that were lost in a call that could not report it.
        self._unreported: tuple[str, ...] | None = None
        self._slot = slot
        self._checkpoints: dict[str, Moment] = {}
        at = None if origin is None else origin.interpreter
        self._interpreter = Interpreter(slot, config.limits, recovery=config.recovery, origin=at)
        try:
            if origin is None:
                self._start()
            else:
                self._bindings = origin.bindings.copy()
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
        if self._turnstile.enter():
            try:
                self._end("was closed")
            finally:
                self._turnstile.leave()

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
        wanted = tuple(checked_read(code, read))
        narrowed = self._limits.narrowed(limits)
        with self._entered():
            self._cells += 1
            cell = read_cell(code, self._bindings.door.operators)
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
        clock = self._clock(limits)
        turn = self._new_turn(clock, limits, on_output)
        output = CellOutput(limits.output_bytes, turn, live=on_output is not None)
        interpreter, protected, mark = self._interpreter, self._interpreter.protected, self._bindings.door.table.mark()
        value: str | None = None
        found: dict[str, Any] = {}
        verdict = Verdict("ok")
        ended: FeedEnded | None = None
        self._cell_names, self._turn = cell.names, turn
        try:
            try:
                last = interpreter.feed(turn, cell.source, shown_as=(f"<cell {self._cells}>", code), listen=output.listen)
                value = cell.shown(last)
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
            stdout=output.text("stdout"),
            stderr=output.text("stderr"),
            value=value if verdict.outcome == "ok" else None,
            error=verdict.error,
            traceback=verdict.traceback,
            limit=verdict.limit,
            state=state,
            lost_names=lost,
            dropped_bytes=output.dropped,
            read=found if verdict.outcome in ("ok", "error") else {},
            usage=Usage(
                time_seconds=clock.guest_seconds, wall_seconds=elapsed, output_bytes=output.total, host_calls=turn.host_calls
            ),
            protected=protected,
        )

    def _verdict(self, ended: FeedEnded, limits: Limits, clock: Clock) -> Verdict:
        return judge(ended, limits, clock, alive=self._interpreter.worker.alive, own_words=self._bindings.door.own_words)

    def _after_a_kill(self, verdict: Verdict, mark: int) -> tuple[State, tuple[str, ...]]:
        if verdict.limit is not None and verdict.limit.kind == "session_seconds":
            self._closed = self._closed or AT_ITS_END
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
            context = self._bindings.context(name)
            if name not in found and context is not None:
                return context.text
            return found.get(name, default)

    def set(self, name: str, value: Any) -> None:
        """See `REPLProtocol.set`."""
        check_free(name)
        sent = self._bindings.sendable(name, value)
        with self._entered():
            with self._reading() as turn:
                self._interpreter.feed(turn, "pass", inputs={name: sent})
            self._bindings.drop(name)
            self._interpreter.names.add(name)
            self._interpreter.protect()

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """See `REPLProtocol.bind`. ``context.whole`` larger than ``value_bytes`` is refused when the guest uses it."""
        check_free(name)
        bound = Bound(target, inline, errors)
        with self._entered():
            if self._is_taken(name):
                self._bindings.check_text(target)
            with self._reading() as turn:
                self._apply(turn, name, bound, fresh=not self._is_taken(name))
            self._bindings.keep(name, bound)
            self._interpreter.names.discard(name)
            self._interpreter.protect()

    def names(self) -> dict[str, str]:
        """See `REPLProtocol.names`."""
        with self._entered(), self._reading() as turn:
            return self._interpreter.summaries(turn, hidden=self._bindings)

    # ---- calls and turns

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """One call at a time, on an open session whose interpreter lives."""
        if not self._turnstile.enter():
            if self._closed:
                raise SessionClosed(f"the session {self._closed}; open a new one")
            raise SessionBusy("the session is running another call; wait for it, or interrupt() it")
        try:
            if not self._closed and self._ends_at is not None and time.monotonic() >= self._ends_at:
                self._closed = AT_ITS_END
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
            self._turnstile.leave()

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
        if self._closed or not self._turnstile.enter_idle():
            return False
        try:
            return not self._closed and self._interpreter.park()
        finally:
            self._turnstile.leave()

    def _clock(self, limits: Limits) -> Clock:
        now = time.monotonic()
        wall = None if limits.wall_seconds is None else now + limits.wall_seconds
        return Clock(limits.time_seconds, self._limits.time_seconds, wall, self._ends_at, now)

    def _new_turn(self, clock: Clock, limits: Limits, on_output: Callable[[OutputChunk], None] | None = None) -> Turn:
        return Turn(
            self._interpreter.worker,
            self._bindings.door,
            self._pool,
            clock,
            host_calls=limits.host_calls,
            known_names=lambda: sorted(self._interpreter.names | self._cell_names),
            lazy=self._bindings.text,
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
        mark = self._bindings.door.table.mark()
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
            raise as_exception(verdict, state) from None
        except BaseException:
            self._turn = None
            if not turn.idle:  # Ctrl-C; an error of the host's own, a target that cannot be bound, leaves it idle
                turn.abandon()
                self._rebuild(mark)
            raise
        finally:
            self._turn = None

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
                    raise as_exception(Verdict("error", error=cell.problem), "kept")
                self._interpreter.feed(turn, cell.source, shown_as=("<setup>", self._setup))
                self._interpreter.names |= cell.names
            for name, bound in self._bindings.items():
                self._apply(turn, name, bound, fresh=True)
                self._interpreter.names.discard(name)
        except FeedEnded as exc:
            verdict = self._verdict(exc, self._limits, clock)
            turn.abandon()
            raise as_exception(verdict, "lost") from None
        finally:
            self._turn = None
        self._interpreter.protect()

    def _renew(self) -> None:
        self._interpreter.renew()
        self._bindings.door.clear()
        self._start()

    def _rebuild(self, mark: int | None) -> tuple[State, tuple[str, ...]]:
        """Replace a dead or distrusted interpreter: from the recovery point, or empty if ``mark`` is None or there is none.

        ``mark``: of the handle table; what was given out since belongs to the interpreter that is gone.
        """
        lost = tuple(sorted(self._interpreter.names))
        try:
            if mark is not None and self._interpreter.restore():
                if mark:
                    self._bindings.door.forget_since(mark)
                return "restored", ()
            self._renew()
        except (SandboxError, monty.MontyError, OSError, RuntimeError):
            self._closed = self._closed or "could not be rebuilt after a failure"
        return "lost", lost

    def _end(self, reason: str) -> None:
        self._closed = self._closed or reason
        self._interpreter.close()
        self._bindings.clear()
        self._pool.close()
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
            self._bindings.clear()
            self._bindings = moment.bindings.copy()

    def _moment(self) -> Moment:
        origin = self._interpreter.origin()
        if origin is None:
            raise LimitExceeded("value_bytes", float(MAX_DUMP_BYTES))
        return Moment(origin, self._bindings.copy())

    # ---- binding

    def _is_taken(self, name: str) -> bool:
        """True if ``name`` may have a value in the guest."""
        return name in self._bindings or name in self._interpreter.names

    def _apply(self, turn: Turn, name: str, bound: Bound, *, fresh: bool) -> None:
        """Give a name its host object in the present interpreter. ``fresh``: the name has no value there."""
        value = self._bindings.value(name, bound, fresh=fresh)
        if value is not None:  # a name without a value asks for a whole text on its first use
            self._interpreter.feed(turn, "pass", inputs={name: value})
