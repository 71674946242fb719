"""`RestrictedSession`: the REPL contract in the host's own process, by the policy. No isolation."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from ...bridge.arguments import as_source, checked_read, sendable
from ...bridge.capture import Capture
from ...bridge.handles import HostCall, plain_copy
from ...bridge.handles import Outcome as CallOutcome
from ...bridge.host_pool import HostPool
from ...bridge.names import checked_name
from ...bridge.one_call import Call, Mark, OneCall
from ...bridge.verdict import from_guest
from ...errors import GuestError, LimitExceeded, SessionBusy, SessionClosed
from ...limits import Limits
from ...protocol import Capabilities
from ...registry import SessionConfig
from ...results import ExecResult, LimitHit, OutputChunk, Usage
from ...runners.host_calls import HostCallError
from ...runners.session import summary
from ...wire.codec import OpaqueValue, ValueRefused, ValueTooLarge
from .cell import Cell, CellStopped
from .door import Door
from .policy.runtime import Policy
from .words import cut, describe

__all__ = ("RestrictedSession",)

_MAX_ECHO: Final = 20_000
_MISSING: Final = object()
#: What one operation may make where there is no memory limit.
_MAX_BYTES: Final = 1 << 30
#: Sources kept for tracebacks.
_KEPT_SOURCES: Final = 1_000
_ENDED: Final = "was closed"
_CLEAR_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class _Bound:
    target: Any
    inline: bool
    errors: tuple[type[BaseException], ...]


class RestrictedSession:
    """See `REPLProtocol`. Cells run on the thread that calls."""

    def __init__(self, config: SessionConfig, capabilities: Capabilities) -> None:
        """
        Raises:
            GuestError, LimitExceeded: ``config.setup`` failed.
        """
        self._config = config
        self._limits = config.limits
        self._capabilities = capabilities
        self._calls = OneCall()
        self._closed = ""
        self._pool = HostPool()
        self._bindings: dict[str, _Bound] = {}
        self._cell: Cell | None = None
        self._sources: dict[str, str] = {}
        self._count = 0
        seconds = config.limits.session_seconds
        self._until = None if seconds is None else time.monotonic() + seconds
        try:
            self._start()
        except BaseException:
            self.close()
            raise

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
        cell = self._cell
        if cell is not None:
            cell.stop()

    def close(self) -> None:
        """See `REPLProtocol.close`. A cell that runs on another thread is told to end, and is not waited for."""
        self._closed = self._closed or _ENDED
        self.interrupt()
        call = Mark(sys._getframe())
        if self._calls.take(call):
            self._leave_call(call)

    def _free(self) -> None:
        self._pool.close()
        self._clear()
        self._sources.clear()

    def _clear(self) -> None:
        """Let go of the variables. What they hold (a generator in a ``try``) may run guest code once more."""
        cell = Cell(self._policy, self._pool, Limits(time_seconds=_CLEAR_SECONDS, host_calls=0), None, Capture(0))
        self._cell = cell
        try:
            cell.run(self._policy.names.clear)
        except CellStopped:
            pass
        finally:
            self._cell = None

    def reset(self) -> None:
        """See `REPLProtocol.reset`."""
        with self._entered():
            try:
                self._clear()
                self._start()
            except BaseException:
                self._closed = self._closed or "could not be reset"
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
        wanted = checked_read(code, read)
        narrowed = self._limits.narrowed(limits)
        with self._entered():
            return self._exec(as_source(code), wanted, narrowed, on_output)

    def _exec(self, code: str, read: list[str], limits: Limits, on_output: Callable[[OutputChunk], None] | None) -> ExecResult:
        self._count += 1
        name = f"<cell {self._count}>"
        self._remember(name, code)
        capture = Capture(limits.output_bytes, on_output)
        value: str | None = None
        found: dict[str, Any] = {}
        failure: tuple[str, str, str] | None = None

        def step() -> None:
            nonlocal value, failure
            try:
                result = self._policy.run(code, name)
                value = None if result is None else cut(repr(result), _MAX_ECHO)
            except CellStopped:
                raise
            except BaseException as exc:  # noqa: BLE001 - whatever a cell raises is its result
                failure = describe(exc, self._sources)
            for wanted in read:
                if wanted in self._policy.names:
                    found[wanted] = self._out(self._policy.names[wanted], limits)

        cell, hit = self._in_cell(limits, capture, step)
        usage = Usage(
            time_seconds=cell.guest_seconds, wall_seconds=cell.wall_seconds, output_bytes=capture.total, host_calls=cell.host_calls
        )
        if cell.host_interrupted:
            raise KeyboardInterrupt
        error = None if failure is None else f"{failure[0]}: {failure[1]}" if failure[1] else failure[0]
        outcome: Any = "ok" if failure is None else "error"
        if hit is not None:
            kind = "TimeLimit" if "seconds" in hit.kind else "LimitExceeded"
            outcome, error, found = "limit", f"{kind}: the cell hit {hit.kind}={hit.limit:,}", {}
        elif cell.interrupted:
            outcome, error, found = "interrupted", "KeyboardInterrupt: the cell was interrupted", {}
        return ExecResult(
            outcome=outcome,
            stdout=capture.text("stdout"),
            stderr=capture.text("stderr"),
            value=value.encode("utf-8", "backslashreplace").decode() if value is not None and outcome == "ok" else None,
            error=error,
            traceback=failure[2] if failure is not None and outcome == "error" else None,
            limit=hit,
            dropped_bytes=capture.dropped,
            read=found,
            usage=usage,
        )

    def _remember(self, name: str, source: str) -> None:
        self._sources[name] = source
        while len(self._sources) > _KEPT_SOURCES:
            del self._sources[next(iter(self._sources))]

    def _in_cell(self, limits: Limits, capture: Capture, step: Callable[[], Any]) -> tuple[Cell, LimitHit | None]:
        """Run guest code within limits; what it raises beside `CellStopped` and refused values is raised."""
        cell = Cell(self._policy, self._pool, limits, self._until, capture)
        self._cell = cell
        hit: LimitHit | None = None
        if self._closed:
            cell.stop()
        try:
            cell.run(step)
        except CellStopped:
            if not cell.stopped:  # a cell that got hold of one, and raised it itself
                cell.stop()
        except ValueTooLarge:
            hit = LimitHit("value_bytes", limits.value_bytes or 0, None, "host")
        except ValueRefused as exc:
            if not cell.stopped:
                raise GuestError("ValueError", f"the value cannot be sent: {exc}") from None
        finally:
            self._cell = None
        hit = cell.hit or hit
        if hit is not None and hit.kind == "session_seconds":
            self._closed = self._closed or f"reached session_seconds={hit.limit:g}"
        return cell, hit

    # ---- values

    def _plain(self, step: Callable[[], Any]) -> Any:
        """Run guest code for a call that returns a value: what goes wrong is raised."""
        result: Any = None
        failure: tuple[str, str, str] | None = None

        def keep() -> None:
            nonlocal result, failure
            try:
                result = step()
            except (CellStopped, ValueRefused):
                raise
            except BaseException as exc:  # noqa: BLE001 - whatever guest code raises is the call's failure
                failure = describe(exc, self._sources)

        cell, hit = self._in_cell(self._limits, Capture(0), keep)
        if cell.host_interrupted:
            raise KeyboardInterrupt
        if hit is not None:
            raise LimitExceeded(hit.kind, hit.limit, hit.observed)
        if cell.interrupted:
            raise GuestError("KeyboardInterrupt", "the call was interrupted")
        if failure is not None:
            raise GuestError(*failure)
        return result

    def _out(self, value: Any, limits: Limits) -> Any:
        return from_guest(plain_copy(value, max_bytes=limits.value_bytes, fallback=_opaque))

    def get(self, name: str, default: Any = None) -> Any:
        """See `REPLProtocol.get`."""
        checked_name(name)
        with self._entered():
            value = self._policy.names.get(name, _MISSING)
            return default if value is _MISSING else self._plain(lambda: self._out(value, self._limits))

    def set(self, name: str, value: Any) -> None:
        """See `REPLProtocol.set`."""
        checked_name(name)
        copied = sendable(name, value, functools.partial(plain_copy, max_bytes=self._limits.value_bytes))
        with self._entered():
            self._policy.names[name] = copied

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """See `REPLProtocol.bind`."""
        checked_name(name)
        bound = _Bound(target, inline, errors)
        with self._entered():
            self._apply(name, bound)
            self._bindings[name] = bound

    def _apply(self, name: str, bound: _Bound) -> None:
        self._policy.names[name] = self._given[name] = self._door.bind(name, bound.target, bound.inline, bound.errors)

    def names(self) -> dict[str, str]:
        """See `REPLProtocol.names`."""
        with self._entered():
            return self._summaries()

    def _summaries(self) -> dict[str, str]:
        """Runs no guest code."""
        return {
            name[:200].encode("utf-8", "replace").decode(): summary(value)
            for name, value in list(self._policy.names.items())
            if type(name) is str and not name.startswith("_") and self._given.get(name, _MISSING) is not value
        }

    # ---- the life of the session

    def _entered(self) -> Call:
        """One call at a time, on an open session."""
        return Call(sys._getframe(1), self._enter_call, self._leave_call)

    def _enter_call(self, call: Mark) -> None:
        if not self._calls.take(call):
            if self._closed:
                raise SessionClosed(f"the session {self._closed}; open a new one")
            raise SessionBusy("the session is running another call; wait for it, or interrupt() it")
        if not self._closed and self._until is not None and time.monotonic() >= self._until:
            self._closed = f"reached session_seconds={self._limits.session_seconds:g}"
        if self._closed:
            self._leave_call(call)
            raise SessionClosed(f"the session {self._closed}; open a new one")

    def _leave_call(self, call: Mark) -> None:
        try:
            if self._closed:
                self._free()
        finally:
            self._calls.give_back(call)

    def _start(self) -> None:
        """Empty names, setup, bindings."""
        names: dict[str, Any] = {}
        limit = self._limits.memory_mb
        self._policy = Policy(
            names,
            write=self._write,
            sleep=self._sleep,
            halt=self._halt,
            max_bytes=_MAX_BYTES if limit is None else limit << 20,
        )
        self._policy.builtins.update(session_names=self._summaries, HostCallError=HostCallError)
        self._policy.stop = True
        self._door = Door(self._call, self._limits.value_bytes)
        self._given: dict[str, Any] = {}
        self._sources = {"<setup>": self._config.setup}
        self._count = 0
        if self._config.setup:
            setup = as_source(self._config.setup)
            self._plain(lambda: self._policy.run(setup, "<setup>"))
        self._given.update(names)
        for name, bound in self._bindings.items():
            self._apply(name, bound)

    # ---- what a cell asks of its host; after its cell it ends there

    def _present(self) -> Cell:
        cell = self._cell
        if cell is None:
            raise CellStopped
        return cell

    def _halt(self) -> None:
        raise CellStopped

    def _write(self, stream: str, text: str) -> None:
        self._present().write(stream, text)

    def _sleep(self, seconds: float) -> None:
        self._present().sleep(seconds)

    def _call(self, call: HostCall) -> CallOutcome:
        return self._present().call(call)


def _opaque(value: Any) -> OpaqueValue:
    """Type name and repr; the repr is guest code, and a stop in it is no value."""
    try:
        text = str.__str__(repr(value))
    except CellStopped:
        raise
    except Exception:  # noqa: BLE001 - foreign code
        text = "<repr failed>"
    return OpaqueValue(str(type(value).__name__), text)
