"""`MontySession`: the REPL contract over one Monty worker at a time, with a dump as recovery point."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

from ...binding import Exposed
from ...bridge.capture import Capture
from ...bridge.host_pool import HostPool
from ...bridge.names import checked_name
from ...context import Context, WholeText
from ...errors import GuestCrashed, GuestError, LimitExceeded, SandboxError, SessionBusy, SessionClosed, UnsendableValue
from ...limits import Limits
from ...protocol import Capabilities
from ...registry import SessionConfig
from ...results import ExecResult, LimitHit, OutputChunk, State, Stream, Usage
from ...wire.codec import ValueRefused
from . import values
from .cells import Cell, read_cell
from .failures import Ending, Failure, read_failure
from .host_calls import HostDoor
from .pool import Slot
from .turn import Clock, Turn, TurnStopped

__all__ = ("MontySession",)

_INTRINSICS: Final = Path(__file__).with_name("guest_intrinsics.py")
#: A recovery point is written while nobody waits; the next call waits for the rest of it this long.
_DUMP_SECONDS: Final = 20.0
#: Recovery ends within this, or the session starts empty.
_RECOVERY_SECONDS: Final = 10.0
#: Sources kept for tracebacks.
_KEPT_SOURCES: Final = 1_000
#: Names of the intrinsics, which are no variables of the guest until it makes them some.
_OWN_NAMES: Final = frozenset({"HostCallError", "session_names"})
#: Reasons of `TurnStopped` that are limits.
_LIMIT_FIELDS: Final = ("time_seconds", "wall_seconds", "session_seconds", "host_calls", "value_bytes")


@dataclass(frozen=True, slots=True)
class _Bound:
    target: Any
    inline: bool
    errors: tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class _Point:
    """A recovery point: the interpreter's state, and what of ours belongs to it."""

    state: bytes
    feeds: int
    names: frozenset[str]


class _Ended(Exception):
    """A turn that did not complete. ``ending`` None: the host stopped it (``stopped``).

    ``idle``: the interpreter itself is between feeds and can go on.
    """

    def __init__(self, ending: Ending | None, stopped: TurnStopped | None, *, idle: bool = False) -> None:
        super().__init__()
        self.ending = ending
        self.stopped = stopped
        self.idle = idle


class MontySession:
    """See `REPLProtocol`."""

    def __init__(self, config: SessionConfig, slot: Slot, capabilities: Capabilities) -> None:
        self._limits = config.limits
        self._setup = config.setup
        self._recovery = config.recovery
        self._capabilities = capabilities
        self._slot = slot
        self._pool = HostPool()
        self._door = HostDoor(config.limits.value_bytes)
        self._mark = secrets.token_hex(8)
        self._busy = threading.Lock()
        self._turn: Turn | None = None
        self._closed = ""
        now = time.monotonic()
        self._ends_at = None if config.limits.session_seconds is None else now + config.limits.session_seconds
        self._bindings: dict[str, _Bound] = {}
        self._texts: dict[str, Context] = {}
        self._sources: dict[int, tuple[str, str]] = {}
        self._names: set[str] = set()
        self._cell_names: frozenset[str] = frozenset()
        self._cells = 0
        self._feeds = 0
        self._point: _Point | None = None
        self._dumping: SimpleQueue[Any] | None = None
        self._worker = slot.new_worker(config.limits)
        try:
            self._start(self._clock(self._limits))
        except BaseException:
            self._end("could not be opened")
            raise
        self._protect()

    # ---- the contract's small parts

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def limits(self) -> Limits:
        return self._limits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def interrupt(self) -> None:
        turn = self._turn
        if turn is not None:
            turn.stop("interrupt")

    def close(self) -> None:
        self._closed = self._closed or "was closed"
        turn = self._turn
        if turn is not None:
            turn.stop("closed")  # whoever runs it frees everything
        if self._busy.acquire(blocking=turn is None and self._dumping is None):
            try:
                self._end("was closed")
            finally:
                self._busy.release()

    def reset(self) -> None:
        with self._entered():
            self._worker.close()
            self._forget()
            clock = self._clock(self._limits)
            self._worker = self._slot.new_worker(self._limits)
            try:
                self._start(clock)
            except BaseException:
                self._end("could not be reset")
                raise
            self._protect()

    # ---- exec

    def exec(
        self,
        code: str,
        *,
        limits: Limits | None = None,
        read: tuple[str, ...] = (),
        on_output: Callable[[OutputChunk], None] | None = None,
    ) -> ExecResult:
        if not isinstance(code, str):
            raise TypeError(f"code must be source code as a str, not {type(code).__name__}")
        if isinstance(read, str):
            raise TypeError(f"exec(read=...) takes a tuple of names, not one string; write ({read!r},)")
        wanted = tuple(checked_name(name) for name in read)
        narrowed = self._limits.narrowed(limits)
        with self._entered() as lost_before:
            self._cells += 1
            cell = read_cell(code, self._door.operators)
            if cell.problem:
                return ExecResult(
                    outcome="error", error=cell.problem, traceback=f"{cell.problem}\n", protected=self._point is not None
                )
            result = self._exec(cell, code, narrowed, wanted, on_output)
            if lost_before is not None and result.state == "kept":
                # The recovery point could not be written after the last cell, and the interpreter died of it.
                return _with_state(result, "lost", lost_before)
            return result

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
            # The live view ends where the kept head could: a flood must not pile up in the mailbox.
            if on_output is not None and (room is None or room > 0):
                turn.post_output(stream, text)
                room = None if room is None else room - len(text)

        protected = self._point is not None
        mark, self._cell_names = self._door.table.mark(), cell.names
        value: str | None = None
        found: dict[str, Any] = {}
        failure: Failure | None = None
        state: State = "kept"
        ended: _Ended | None = None
        lost: tuple[str, ...] = ()
        self._turn = turn
        try:
            try:
                self._keep_source(f"<cell {self._cells}>", code)
                value = _echo(self._feed(turn, cell.source, listen), cell)
                self._names |= cell.names
                found = self._take(turn, read)
            except _Ended as exc:
                ended = exc
                if exc.ending is not None and exc.ending.kind == "error":
                    self._names |= cell.names
                    failure = Failure(self._door.own_words(exc.ending.failure.text), exc.ending.failure.traceback)
                    found = self._take(turn, read)
            except ValueRefused:
                ended = _Ended(None, TurnStopped("value_bytes"), idle=True)
        except _Ended as exc:
            ended, failure = exc, None
        except BaseException:
            # Ctrl-C, or the caller's own on_output raised: the cell is over, the session is not.
            turn.abandon()
            self._turn = None
            self._rebuild(mark)
            raise
        finally:
            self._turn = None
            self._cell_names = frozenset()
        outcome, limit, error = self._verdict(ended, failure, limits, clock)
        if outcome in ("ok", "error") or (ended is not None and ended.idle):
            self._protect()
        else:
            turn.abandon()
            if limit is not None and limit.kind == "session_seconds":
                lost = tuple(sorted(self._names))
                self._end("reached its session_seconds")
                state = "lost"
            elif self._closed:
                lost, state = tuple(sorted(self._names)), "lost"
            else:
                state, lost = self._rebuild(mark)
        return ExecResult(
            outcome=outcome,  # type: ignore[arg-type]
            stdout=capture.text("stdout"),
            stderr=capture.text("stderr"),
            value=value if outcome == "ok" else None,
            error=error,
            traceback=failure.traceback if failure is not None else None,
            limit=limit,
            state=state,
            lost_names=lost,
            dropped_bytes=capture.dropped,
            read=found if outcome in ("ok", "error") else {},
            usage=Usage(
                time_seconds=clock.guest_seconds,
                wall_seconds=clock.elapsed,
                output_bytes=capture.total,
                host_calls=turn.host_calls,
            ),
            protected=protected,
        )

    def _verdict(
        self, ended: _Ended | None, failure: Failure | None, limits: Limits, clock: Clock
    ) -> tuple[str, LimitHit | None, str | None]:
        """Outcome, limit and error of a cell: decided from what the host measured, not from what the guest said."""
        if ended is None:
            return "ok", None, None
        if ended.stopped is not None:
            reason = ended.stopped.reason
            if reason in _LIMIT_FIELDS:
                hit = LimitHit(reason, float(getattr(limits, reason) or 0), ended.stopped.observed, "host")
                return "limit", hit, _limit_text(hit)
            return "interrupted", None, "the cell was interrupted"
        ending = ended.ending
        assert ending is not None
        if ending.kind == "memory" and limits.memory_mb is not None:
            # A process that died of it is the kernel's word; the interpreter's own refusal is the guest's side.
            observed = None if ending.observed_bytes is None else ending.observed_bytes / (1 << 20)
            hit = LimitHit("memory_mb", limits.memory_mb, observed, "guest" if self._worker.alive else "kernel")
            return "limit", hit, _limit_text(hit)
        if ending.kind == "time" and limits.time_seconds is not None and clock.guest_seconds >= limits.time_seconds:
            hit = LimitHit("time_seconds", limits.time_seconds, clock.guest_seconds, "host")
            return "limit", hit, _limit_text(hit)
        if ending.kind == "died" or not self._worker.alive:
            return "crashed", None, ending.failure.text
        return "error", None, failure.text if failure is not None else self._door.own_words(ending.failure.text)

    # ---- values

    def get(self, name: str, default: Any = None) -> Any:
        checked_name(name)
        with self._entered():
            with self._reading() as turn:
                found = self._take(turn, (name,))
            if name not in found and name in self._texts:
                return self._texts[name].text
            return found.get(name, default)

    def set(self, name: str, value: Any) -> None:
        _check_name(name)
        if isinstance(value, Context | Exposed | WholeText) or callable(value):
            raise TypeError(f"set() takes plain data; use bind({name!r}, ...) for functions and objects")
        try:
            sent = self._door.value(value)
        except ValueRefused as exc:
            raise UnsendableValue(f"{name} cannot be set: {exc}; send plain data, or bind an object with expose()") from None
        with self._entered():
            self._assign(name, sent)
            self._unbind(name)
            self._names.add(name)
            self._protect()

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        _check_name(name)
        with self._entered():
            self._bind(name, _Bound(target, inline, errors))
            self._protect()

    def names(self) -> dict[str, str]:
        with self._entered():
            with self._reading() as turn:
                found = self._feed(turn, "_rlm_summaries(locals())")
            if not isinstance(found, dict):
                return {}
            return {
                key[:200]: text[:200]
                for key, text in found.items()
                if type(key) is str
                and type(text) is str
                and key not in self._bindings
                and (key not in _OWN_NAMES or key in self._names)
            }

    # ---- turns

    @contextlib.contextmanager
    def _entered(self) -> Iterator[tuple[str, ...] | None]:
        """One call at a time. Yields the names that were lost since the last call, if the interpreter died in between."""
        if not self._busy.acquire(blocking=False):
            if self._closed:
                raise SessionClosed(f"the session {self._closed}; open a new one")
            raise SessionBusy("the session is running another call; wait for it, or interrupt() it")
        try:
            if not self._closed and self._ends_at is not None and time.monotonic() >= self._ends_at:
                self._end("reached its session_seconds")
            if self._closed:
                raise SessionClosed(f"the session {self._closed}; open a new one")
            lost = None
            if not self._settle() or not self._worker.alive:
                lost = self._rebuild(None)[1]
                if self._closed:
                    raise SessionClosed(f"the session {self._closed}; open a new one")
            yield lost
        finally:
            if self._closed:
                self._end(self._closed)
            self._busy.release()

    def _clock(self, limits: Limits) -> Clock:
        now = time.monotonic()
        wall = None if limits.wall_seconds is None else now + limits.wall_seconds
        return Clock(limits.time_seconds, self._limits.time_seconds, wall, self._ends_at, now)

    def _new_turn(self, clock: Clock, limits: Limits, on_output: Callable[[OutputChunk], None] | None = None) -> Turn:
        return Turn(
            self._worker,
            self._door,
            self._pool,
            clock,
            host_calls=limits.host_calls,
            known_names=lambda: sorted(self._names | self._cell_names),
            lazy=self._lazy,
            on_output=on_output,
        )

    def _feed(
        self, turn: Turn, source: str, listen: Callable[[Stream, str], None] | None = None, inputs: dict[str, Any] | None = None
    ) -> Any:
        """Run source in the interpreter.

        Raises:
            _Ended: it did not complete.
        """
        session = self._worker.session
        self._feeds += 1
        try:
            return turn.run(lambda: session.feed_start(source, inputs=inputs, print_callback=listen or _nowhere))
        except TurnStopped as exc:
            raise _Ended(None, exc) from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as exc:
            if isinstance(exc, SandboxError) or not _is_engines(exc):
                raise
            raise _Ended(read_failure(exc, self._worker.alive, self._sources), None) from None

    def _take(self, turn: Turn, names: tuple[str, ...]) -> dict[str, Any]:
        """The plain values of variables that exist."""
        wanted = [name for name in dict.fromkeys(names) if name not in _OWN_NAMES or name in self._names]
        if not wanted:
            return {}
        found = self._feed(turn, f"_rlm_take(locals(), {wanted!r}, {self._mark!r})")
        if type(found) is not dict:
            return {}
        return {
            name: values.from_guest(value, self._mark, self._limits.value_bytes) for name, value in found.items() if name in wanted
        }

    @contextlib.contextmanager
    def _reading(self, clock: Clock | None = None) -> Iterator[Turn]:
        """A turn of a call that returns a plain value: what goes wrong is raised.

        Raises:
            GuestError, LimitExceeded, GuestCrashed, SessionClosed.
        """
        clock = clock or self._clock(self._limits)
        turn = self._new_turn(clock, self._limits)
        mark = self._door.table.mark()
        self._turn = turn
        try:
            yield turn
        except ValueRefused:
            limit = self._limits.value_bytes
            raise LimitExceeded("value_bytes", float(limit if limit is not None else values.MAX_FRAME_BYTES)) from None
        except _Ended as exc:
            self._turn = None
            outcome, hit, error = self._verdict(exc, None, self._limits, clock)
            if outcome == "error" and exc.ending is not None:
                type_name, _, message = (error or "").partition(": ")
                raise GuestError(type_name, message, exc.ending.failure.traceback) from None
            turn.abandon()
            if hit is not None and hit.kind == "session_seconds":
                self._end("reached its session_seconds")
                raise SessionClosed("the session reached its session_seconds; open a new one") from None
            state = self._rebuild(mark)[0]
            if hit is not None:
                raise LimitExceeded(hit.kind, hit.limit, hit.observed) from None
            raise GuestCrashed(
                f"{error or 'the interpreter died'}; the session is usable, its state is {state}", state=state
            ) from None
        except BaseException:
            turn.abandon()
            self._turn = None
            self._rebuild(mark)
            raise
        finally:
            self._turn = None

    def _lazy(self, name: str) -> str | None:
        context = self._texts.get(name)
        return None if context is None else self._text(context)

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

    # ---- life of the interpreter

    def _start(self, clock: Clock) -> None:
        """Prepare a fresh interpreter: intrinsics, setup, bindings.

        Raises:
            GuestError, LimitExceeded, GuestCrashed: setup failed. The worker is not closed.
        """
        turn = self._new_turn(clock, self._limits)
        self._turn = turn
        try:
            self._feed(turn, _INTRINSICS.read_text(encoding="utf-8"))
            if self._setup:
                cell = read_cell(self._setup, {})
                if cell.problem:
                    type_name, _, message = cell.problem.partition(": ")
                    raise GuestError(type_name, message)
                self._keep_source("<setup>", self._setup)
                self._feed(turn, self._setup)
                self._names |= cell.names
            for name, bound in self._bindings.items():
                self._apply(turn, name, bound, fresh=True)
        except _Ended as exc:
            outcome, hit, error = self._verdict(exc, None, self._limits, clock)
            turn.abandon()
            if hit is not None:
                raise LimitExceeded(hit.kind, hit.limit, hit.observed) from None
            if outcome == "error" and exc.ending is not None:
                type_name, _, message = (error or "").partition(": ")
                raise GuestError(type_name, message, exc.ending.failure.traceback) from None
            raise GuestCrashed(f"setup ended the interpreter: {error}") from None
        finally:
            self._turn = None

    def _rebuild(self, mark: int | None) -> tuple[State, tuple[str, ...]]:
        """Replace a dead or distrusted interpreter: from the recovery point, or empty. Never raises a guest's fault."""
        lost = tuple(sorted(self._names))
        self._dumping = None
        self._worker.close()
        try:
            self._worker = self._slot.new_worker(self._limits)
            if mark is not None and self._point is not None and self._restore(self._point):
                self._door.forget_since(mark)
                return "restored", ()
            if not self._worker.alive:
                self._worker.close()
                self._worker = self._slot.new_worker(self._limits)
            self._forget()
            self._start(self._clock(self._limits))
        except (SandboxError, OSError):
            self._end("could not be rebuilt after a failure")
            return "lost", lost
        self._protect()
        return "lost", lost

    def _restore(self, point: _Point) -> bool:
        worker = self._worker
        done: SimpleQueue[Any] = SimpleQueue()
        worker.submit(lambda: worker.load(point.state), done)
        try:
            _, _, exc = done.get(timeout=_RECOVERY_SECONDS)
        except Empty:
            worker.kill()
            return False
        if exc is not None:
            worker.kill()
            return False
        self._feeds = point.feeds
        self._names = set(point.names)
        return True

    def _forget(self) -> None:
        self._point = None
        self._dumping = None
        self._feeds = 0
        self._sources.clear()
        self._names.clear()
        self._door.clear()

    def _protect(self) -> None:
        """Start writing a recovery point of the present state; the next call waits for the rest of it."""
        self._point = None
        if not self._recovery:
            return
        worker, feeds, names = self._worker, self._feeds, frozenset(self._names)

        def write() -> _Point | None:
            state = worker.dump()
            return None if state is None else _Point(state, feeds, names)

        self._dumping = SimpleQueue()
        worker.submit(write, self._dumping)

    def _settle(self) -> bool:
        """Wait for a recovery point that is being written. False if the interpreter did not survive it."""
        dumping, self._dumping = self._dumping, None
        if dumping is None:
            return True
        try:
            _, point, exc = dumping.get(timeout=_DUMP_SECONDS)
        except Empty:
            self._worker.kill()
            return False
        self._point = point if exc is None else None
        return exc is None or self._worker.alive

    def _end(self, reason: str) -> None:
        self._closed = reason if not self._closed or self._closed == reason else self._closed
        self._worker.close()
        self._door.clear()
        self._pool.close()
        self._slot.release()
        self._point = None
        self._dumping = None
        self._texts.clear()

    # ---- binding

    def _bind(self, name: str, bound: _Bound) -> None:
        if isinstance(bound.target, WholeText) and self._is_taken(name):
            try:
                self._text(bound.target.context)
            except TurnStopped as exc:
                raise LimitExceeded("value_bytes", float(self._limits.value_bytes or 0), exc.observed) from None
        with self._reading() as turn:
            self._apply(turn, name, bound)
        self._bindings[name] = bound
        self._names.discard(name)

    def _is_taken(self, name: str) -> bool:
        return name in self._bindings or name in self._names

    def _apply(self, turn: Turn, name: str, bound: _Bound, *, fresh: bool = False) -> None:
        target = bound.target
        if isinstance(target, WholeText):
            self._door.unbind(name)
            self._texts[name] = target.context
            if not fresh and self._is_taken(name):
                # The name may have a value by now; without one, the first use asks for the text.
                self._feed(turn, "pass", inputs={name: self._text(target.context)})
            return
        value = self._door.bind(name, target, bound.inline, bound.errors)
        self._texts.pop(name, None)
        self._feed(turn, "pass", inputs={name: value})

    def _unbind(self, name: str) -> None:
        self._bindings.pop(name, None)
        self._texts.pop(name, None)
        self._door.unbind(name)

    def _assign(self, name: str, value: Any) -> None:
        with self._reading() as turn:
            self._feed(turn, "pass", inputs={name: value})

    def _keep_source(self, file: str, source: str) -> None:
        self._sources[self._feeds] = (file, source)
        if len(self._sources) > _KEPT_SOURCES:
            del self._sources[next(iter(self._sources))]


def _nowhere(stream: Stream, text: str) -> None:
    """Output of reading a value has no result to appear in."""


def _is_engines(exc: Exception) -> bool:
    # Engine calls raise MontyError, and RuntimeError or ValueError for a session that is gone or text beyond its frames.
    return type(exc).__module__.startswith("pydantic_monty") or isinstance(exc, RuntimeError | ValueError | TypeError | OSError)


def _echo(output: Any, cell: Cell) -> str | None:
    if output is None:
        return None
    if cell.echoes and isinstance(output, str):
        return output
    return repr(output)[:100_000] if type(output) in (bool, float, str, bytes, list, dict, tuple, set) else str(output)[:4_000]


def _limit_text(hit: LimitHit) -> str:
    return f"the {hit.kind} limit of {hit.limit:g} was hit"


def _check_name(name: str) -> None:
    if checked_name(name).startswith("_rlm"):
        raise ValueError(f"{name!r} is reserved; choose another name")


def _with_state(result: ExecResult, state: State, lost: tuple[str, ...]) -> ExecResult:
    return dataclasses.replace(result, state=state, lost_names=lost)
