"""`FramedSession`: `REPLProtocol` over any `Guest` that speaks frames. Used by every backend whose guest is our runner."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from ..context import Context, WholeText
from ..errors import (
    BackendUnavailable,
    GuestCrashed,
    ProtocolViolation,
    SandboxError,
    SessionBusy,
    SessionClosed,
    UnsendableValue,
)
from ..limits import Limits
from ..protocol import Capabilities
from ..registry import SessionConfig
from ..results import ExecResult, LimitHit, OutputChunk, State, Usage
from ..wire.codec import Attachment, Encoder, ValueRefused
from ..wire.frames import FrameTooLarge, dump_frame
from ..wire.messages import BindObject, BindText, Configure, Exec, Get, Message, Names, Protect, SetValue, dump_message
from .capture import Capture
from .guest import Death, Guest, GuestLost
from .handles import HandleTable
from .host_pool import HostPool
from .names import checked_name
from .turn import Turn, TurnEnd, WakePipe, shown
from .verdict import from_guest, how_it_died, judge, killed_error, turn_error, worse

__all__ = ("FramedSession",)

log: Final = logging.getLogger("rlm_sandbox.session")

#: A heap that leaves less than this after a cell is given up for the recovery point: no cell could run in it.
_HEADROOM_MB: Final = 8
_HEADROOM_SHARE: Final = 0.02
#: CPU that making a standby may cost a worker between turns (1 GB of small objects: 60 ms). More is charged to the next cell.
_FREE_CPU_SECONDS: Final = 0.25
_HELLO_SECONDS: Final = 10.0
#: A standby is the cell's own memory: what the cell did to it may keep it from greeting, and recovery has 2 s.
_STANDBY_HELLO_SECONDS: Final = 1.5
#: The supervisor's own deadline is shorter; this one catches a supervisor that is gone or hung.
_PROTECT_SECONDS: Final = 5.0
#: Between two turns there are a ticket's answer, a death or two, and a standby's; a supervisor that says more has gone wrong.
_MAX_REPORTS: Final = 8
#: The echo of a cell; an honest guest cuts it at 20,000 and says so.
_MAX_ECHO_CHARS: Final = 20_100


@dataclass(frozen=True, slots=True)
class _Binding:
    """How to make one binding again in a fresh guest."""

    target: Any
    inline: bool
    errors: tuple[type[BaseException], ...]


class FramedSession:
    """A session. One call at a time, from any thread; `interrupt` and `close` may come concurrently."""

    def __init__(self, start: Callable[[], Guest], config: SessionConfig, capabilities: Capabilities) -> None:
        """
        Args:
            start: starts a guest; called again if one is lost altogether.
            config: what the session was opened with.
            capabilities: what it declares.

        Raises:
            BackendUnavailable: the guest did not start.
            GuestError, LimitExceeded, GuestCrashed: ``config.setup`` failed.
        """
        self._freed = True
        self._owner = os.getpid()
        self._start = start
        self._config = config
        self._capabilities = capabilities
        self._limits = config.limits
        self._lock = threading.Lock()
        self._closed = False
        self._close_reason = "the session was closed"
        self._interrupted = False
        self._running = False
        self._handles = HandleTable()
        self._pool = HostPool()
        self._bindings: dict[str, _Binding] = {}
        self._known_names: list[str] = []
        self._cell = 0
        self._protected = False
        self._protecting = False
        self._has_standby = False
        self._cpu_at_end: float | None = None
        self._stale = True
        self._setting_up = False
        self._out_of_step = False
        self._pending_state: State = "kept"
        self._pending_lost: tuple[str, ...] = ()
        self._until: float | None = None
        try:
            self._wake = WakePipe()
        except OSError as exc:
            reason = f"this process cannot open a pipe ({exc.strerror})"
            raise BackendUnavailable(capabilities.backend, reason, "close sessions, or raise the limit: ulimit -n") from exc
        try:
            self._guest = start()
        except BaseException:
            self._wake.close()
            raise
        self._freed = False
        # From here, not from the call: a container may take longer to start than a short session is to live.
        seconds = self._limits.session_seconds
        self._until = None if seconds is None else time.monotonic() + seconds
        try:
            self._greet()
            self._configure()
        except BaseException:
            self.close()
            raise

    # ---- the contract

    @property
    def capabilities(self) -> Capabilities:
        """See `REPLProtocol`."""
        return self._capabilities

    @property
    def limits(self) -> Limits:
        """The session's limits."""
        return self._limits

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
        names = [checked_name(name) for name in read]
        narrowed = self._limits.narrowed(limits)
        source = code.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not source code
        with self._call():
            return self._exec(source, names, narrowed, on_output)

    def get(self, name: str, default: Any = None) -> Any:
        """See `REPLProtocol.get`."""
        with self._call():
            end = self._plain_turn(Get(checked_name(name)))
            return default if end.unknown else from_guest(end.value)

    def set(self, name: str, value: Any) -> None:
        """See `REPLProtocol.set`."""
        checked_name(name)
        if callable(value):
            raise TypeError(f"set() sends plain data; to make {name} callable in the guest use bind({name!r}, ...)")
        encoder = Encoder(max_bytes=self._limits.value_bytes)
        try:
            tree = encoder.encode(value)
        except ValueRefused as exc:
            raise UnsendableValue(f"{name} cannot be sent: {exc}; send plain data or bind(expose(...))") from None
        with self._call():
            self._plain_turn(SetValue(name, tree), encoder.attachments)
            self._stale = True

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """See `REPLProtocol.bind`."""
        checked_name(name)
        binding = _Binding(target, inline, errors)
        with self._call():
            self._bind(name, binding)
            self._bindings[name] = binding
            self._stale = True

    def names(self) -> dict[str, str]:
        """See `REPLProtocol.names`."""
        with self._call():
            value = self._plain_turn(Names()).value
            if type(value) is not dict or not all(type(item) is str for pair in value.items() for item in pair):
                raise ProtocolViolation("the guest's list of names is malformed")
            return {shown(key, 200): shown(text, 400) for key, text in value.items()}

    def interrupt(self) -> None:
        """See `REPLProtocol.interrupt`."""
        if self._running:
            self._interrupted = True
            self._wake.wake()

    def reset(self) -> None:
        """See `REPLProtocol.reset`."""
        with self._call():
            try:
                self._await_protection()
                self._guest.recover(fresh=True)
                self._greet()
                self._set_up_again()
            except GuestLost:
                self._rebuild()
            self._take_pending()  # what went was to go

    def close(self) -> None:
        """See `REPLProtocol.close`."""
        if self._closed:
            return
        self._closed = True
        self.interrupt()
        self._free_if_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_freed", True):
            warnings.warn(f"{self!r} was not closed; use it as a context manager", ResourceWarning, source=self, stacklevel=2)
            self._free()

    # ---- one call at a time

    @contextmanager
    def _call(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            self._check_open()  # a `close` on another thread holds the lock while it frees
            raise SessionBusy("the session is running another call; wait for it, or use one session per thread")
        try:
            self._check_open()
            self._interrupted, self._running = False, True
            yield
        finally:
            self._running = False
            self._lock.release()
            self._free_if_closed()

    def _free_if_closed(self) -> None:
        """Whoever comes last frees: a `close` that found the lock taken has left it to the call that held it."""
        if self._closed and self._lock.acquire(blocking=False):
            try:
                self._free()
            finally:
                self._lock.release()

    def _check_open(self) -> None:
        if self._owner != os.getpid():
            raise SessionClosed("the session belongs to the process that opened it; open a new one in this one")
        if not self._closed and self._until is not None and time.monotonic() >= self._until:
            self._close_reason = f"the session reached session_seconds={self._limits.session_seconds:g}"
            self._closed = True
        if self._closed:
            raise SessionClosed(f"{self._close_reason}; open a new one")

    def _free(self) -> None:
        if not self._freed:
            self._freed = True
            self._guest.close()
            self._pool.close()
            self._wake.close()

    # ---- turns

    def _turn(
        self,
        limits: Limits,
        capture: Capture,
        message: Message,
        attachments: list[Attachment],
        fds: tuple[int, ...] = (),
        charged: float = 0.0,
    ) -> TurnEnd:
        turn = Turn(self._guest, self._handles, self._pool, self._wake, limits, capture, self._is_interrupted, self._until, charged)
        # Whatever is raised from here on, a signal handler's SystemExit included, leaves a guest that is still in this turn
        # and would answer the next one with its end.
        self._out_of_step = True
        try:
            end = turn.run(message, attachments, fds)
        except FrameTooLarge:
            self._out_of_step = False  # nothing was sent
            raise
        except BaseException:
            self._guest.stop()
            raise
        self._out_of_step = end.kind != "done"
        return end

    def _is_interrupted(self) -> bool:
        """An interrupt is for the call, not for making its session whole again."""
        return self._closed or (self._interrupted and not self._setting_up)

    def _plain_turn(self, message: Message, attachments: list[Attachment] | None = None, fds: tuple[int, ...] = ()) -> TurnEnd:
        """A turn that is not a cell: what goes wrong is raised."""
        # Reading runs guest code (a repr), which is killed like a cell; it must not cost what was set since the last one.
        self._prepare(protect=isinstance(message, Get | Names))
        try:
            end = self._turn(self._limits, Capture(0), message, attachments or [], fds)
        except FrameTooLarge as exc:
            raise UnsendableValue(f"this cannot be sent: {exc}; send it in parts") from None
        if end.kind == "done":
            self._note_names(end)
            self._guest.stop()
            self._cpu_at_end = self._guest.cpu_seconds()  # what this turn used was on its own clock
            error = turn_error(end, self._limits)
            if error is not None:
                raise error
            return end
        if self._setting_up:
            raise GuestLost(f"setting up a fresh guest failed ({end.detail or how_it_died(end.death)})")
        state, lost, death = self._recover(end)
        if state == "lost":  # a restored session is as it was before this call: nothing the next result would have to say
            self._pending_state, self._pending_lost = state, (*self._pending_lost, *lost)
        raise killed_error(end, state, death)

    def _exec(self, code: str, read: list[str], limits: Limits, on_output: Callable[[OutputChunk], None] | None) -> ExecResult:
        self._prepare(protect=True)
        self._cell += 1
        protected = self._protected
        capture = Capture(limits.output_bytes, on_output)
        if self._is_interrupted():  # before it began
            state, lost = self._take_pending()
            return self._result(TurnEnd("done", interrupted=True), capture, Death(), None, state, lost, Usage(), protected)
        started, cpu_before = time.monotonic(), self._guest.cpu_seconds()
        charged = self._burnt_between_turns(cpu_before)
        try:
            end = self._turn(limits, capture, Exec(self._cell, code, read, limits.output_bytes), [], charged=charged)
        except FrameTooLarge:
            raise ValueError("the cell's source is too long; bind a long text as a Context or set() it") from None
        if end.kind == "done" and not end.read.keys() <= set(read):
            end.kind, end.detail, end.read, end.failure = "violation", "it sent values nobody asked for", {}, None
        death, peak, cpu_after = end.death, None, None
        if end.kind == "done":
            out_of_memory = self._out_of_memory()
            if out_of_memory is not None or _is_memory_error(end):
                peak = self._guest.peak_memory_mb()
            # Without a recovery point the heap is kept: the caller may still free something of it.
            if out_of_memory is not None and self._has_standby:
                end.kind = "killed"
                if not _is_memory_error(end):
                    end.hit = out_of_memory
        state, lost = self._take_pending()
        if end.kind == "done":
            cpu_after = self._cpu_at_end = self._guest.cpu_seconds()
            self._note_names(end)
            self._protect()
        else:
            new_state, new_lost, death = self._recover(end)
            state, lost = worse(state, new_state), (*lost, *new_lost)
            peak, cpu_after = death.peak_memory_mb, death.cpu_seconds
        if end.host_interrupted:
            raise KeyboardInterrupt
        usage = Usage(
            time_seconds=end.turn_seconds,
            wall_seconds=time.monotonic() - started,
            cpu_seconds=None if cpu_after is None or cpu_before is None else max(0.0, cpu_after - cpu_before),
            memory_mb=peak,
            output_bytes=capture.total,
            host_calls=end.host_calls,
        )
        return self._result(end, capture, death, peak, state, lost, usage, protected)

    def _take_pending(self) -> tuple[State, tuple[str, ...]]:
        """What became of the state since the last result."""
        pending = self._pending_state, self._pending_lost
        self._pending_state, self._pending_lost = "kept", ()
        return pending

    def _result(
        self,
        end: TurnEnd,
        capture: Capture,
        death: Death,
        peak: float | None,
        state: State,
        lost: tuple[str, ...],
        usage: Usage,
        protected: bool,
    ) -> ExecResult:
        outcome, error, hit = judge(end, death, peak, self._limits)
        return ExecResult(
            outcome=outcome,
            stdout=capture.text("stdout"),
            stderr=capture.text("stderr"),
            value=shown(end.value, _MAX_ECHO_CHARS) if type(end.value) is str and outcome == "ok" else None,
            error=error,
            traceback=(end.failure[2] or None) if end.failure is not None else None,
            limit=hit,
            state=state,
            lost_names=lost,
            dropped_bytes=capture.dropped,
            read={name: from_guest(value) for name, value in end.read.items()},
            usage=usage,
            protected=protected,
        )

    def _out_of_memory(self) -> LimitHit | None:
        """Whether what the cell left behind would fail the next cell, too: measured from outside."""
        limit = self._limits.memory_mb
        if limit is None:
            return None
        headroom = self._guest.memory_headroom_mb()
        if headroom is None or headroom >= max(_HEADROOM_MB, limit * _HEADROOM_SHARE):
            return None  # None: the worker is gone, which is not for want of memory, and is reported by itself
        return LimitHit("memory_mb", limit, round(limit - headroom, 1), "host")

    def _burnt_between_turns(self, cpu_now: float | None) -> float:
        """CPU seconds that threads of the guest used while its standby was made, beyond what making it may cost."""
        before, self._cpu_at_end = self._cpu_at_end, None
        if cpu_now is None or before is None or cpu_now - before < _FREE_CPU_SECONDS:
            return 0.0
        return cpu_now - before

    def _note_names(self, end: TurnEnd) -> None:
        if end.names is not None:
            self._known_names = [shown(name, 200) for name in end.names[:10_000]]

    # ---- bindings

    def _configure(self) -> None:
        setup = self._config.setup.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not source code
        self._plain_turn(Configure(self._limits.output_bytes, self._limits.value_bytes, setup))

    def _bind(self, name: str, binding: _Binding) -> None:
        target = binding.target
        whole = isinstance(target, WholeText)
        context = target.context if isinstance(target, WholeText) else target
        if isinstance(context, Context) and (self._guest.maps_contexts or whole):
            self._bind_text(name, context, whole=whole)
            return
        mark = self._handles.mark()
        kind, reference = self._handles.add(name, target, inline=binding.inline, errors=binding.errors)
        message = BindObject(
            name,
            reference.handle,
            kind,
            reference.type_name,
            list(reference.methods),
            list(reference.attributes),
            list(reference.operators),
        )
        try:
            self._plain_turn(message)
        except BaseException:
            self._handles.drop_since(mark)
            raise

    def _bind_text(self, name: str, context: Context, *, whole: bool) -> None:
        stored = context.memory_file()
        encoder = Encoder()
        spans = encoder.encode(array("Q", context.spans).tobytes())
        meta = encoder.encode(context.added_metadata)
        message = BindText(name, whole, stored.chars, stored.width, stored.ascii_only, spans, meta)
        self._prepare()
        try:
            self._guest.grow_address_space(os.fstat(stored.fd).st_size + (1 << 20))
        except GuestLost as exc:
            if self._setting_up:
                raise
            self._recover_between(Death())
            raise GuestCrashed(f"the guest was lost before the context could be bound ({exc})", state=self._pending_state) from None
        fd = self._guest.open_context(context)
        try:
            self._plain_turn(message, encoder.attachments, (fd,))
        finally:
            os.close(fd)

    # ---- recovery

    def _greet(self, seconds: float = _HELLO_SECONDS) -> None:
        turn = Turn(self._guest, self._handles, self._pool, self._wake, self._limits, Capture(0), lambda: False, None)
        turn.expect_hello(seconds)
        self._out_of_step = False

    def _protect(self) -> None:
        """Begin to make a standby of the present state; the worker is stopped when it is there."""
        self._protected, self._stale = False, False
        if not self._config.recovery:
            self._guest.stop()
            return
        self._protecting = True  # first: after a Ctrl-C in the middle of this the supervisor's answer is still to be waited for
        try:
            self._guest.request_protection()
            for buffer in dump_frame(dump_message(Protect()), [], max_bytes=1 << 20):
                self._guest.data.sendall(buffer)
        except (GuestLost, OSError):
            self._protecting = False
            self._out_of_step = True  # it closed its channel, say: the next cell gets another worker
            self._guest.stop()

    def _await_protection(self) -> None:
        """Wait for the standby that is being made, and take what the supervisor reported meanwhile."""
        until = time.monotonic() + _PROTECT_SECONDS
        for _ in range(_MAX_REPORTS):
            poll = select.poll()
            poll.register(self._guest.control_fd, select.POLLIN)
            left = until - time.monotonic() if self._protecting else 0.0
            if not poll.poll(max(0.0, left) * 1000):
                if self._protecting:
                    raise GuestLost("the supervisor did not answer")
                return
            report = self._guest.report()
            if report is None:
                continue
            if report.kind == "died":
                if self._setting_up:
                    raise GuestLost("the worker died while it was set up")
                self._recover_between(report.death)
            elif report.kind == "standby_died":  # while a ticket is open, the one before
                self._protected = self._has_standby = False
                self._stale = True
            elif self._protecting:
                self._protecting = False
                self._protected = self._has_standby = report.kind == "protected"
                self._stale = not self._protected  # tried again before the next cell
            else:
                raise GuestLost("the supervisor reported what nobody asked for")
        raise GuestLost("the supervisor reports without end")

    def _prepare(self, *, protect: bool = False) -> None:
        """Before a turn: finish the standby, notice what died meanwhile, drop what was printed between turns."""
        try:
            if self._out_of_step:
                self._recover_between(Death(why="its last turn was abandoned"))
            self._await_protection()
            if self._spoke_between_turns():
                self._recover_between(Death(why="it sent something between turns"))
                self._await_protection()
            if protect and self._stale and self._config.recovery:
                self._guest.wake()
                self._protect()
                self._await_protection()
        except GuestLost:
            if self._setting_up:
                raise
            self._lose()
        if self._closed:  # by another thread, or because it could not be rebuilt
            self._check_open()
        self._drop_stray_output()

    def _spoke_between_turns(self) -> bool:
        """Whether the worker sent more than the end of its last turn: that cell forged it, or left a thread that writes."""
        try:
            return bool(self._guest.data.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _drop_stray_output(self) -> None:
        for fd in self._guest.outputs:
            for _ in range(64):
                try:
                    if not os.read(fd, 1 << 16):
                        break
                except OSError:
                    break

    def _recover_between(self, death: Death) -> None:
        """The worker died between turns. The next result says what became of the state."""
        state, lost, _ = self._recover(TurnEnd("died", death=death))
        self._pending_state, self._pending_lost = worse(self._pending_state, state), (*self._pending_lost, *lost)

    def _recover(self, end: TurnEnd) -> tuple[State, tuple[str, ...], Death]:
        """After a kill: the standby, else a fresh worker with setup and bindings, else a whole new guest."""
        self._protected = self._protecting = False
        had_standby, self._has_standby = self._has_standby, False
        self._cpu_at_end = None
        lost = tuple(self._known_names)
        try:
            # A standby that lacks what was set or bound since is not what the session was before this call.
            recovery = self._guest.recover(fresh=not had_standby or self._stale)
            self._greet(_STANDBY_HELLO_SECONDS if recovery.state == "restored" else _HELLO_SECONDS)
            death = recovery.death if recovery.death.status is not None else end.death
            if recovery.state == "restored":
                self._protect()
                return "restored", (), death
            self._set_up_again()
        except GuestLost as exc:
            log.warning("a guest was lost: %s", exc)
            try:
                self._rebuild()
            except SessionClosed:  # later calls say so; this one has its result
                log.warning("the session could not be rebuilt", exc_info=True)
            return "lost", lost, end.death
        return "lost", lost, death

    def _lose(self) -> None:
        """The guest is gone between turns. The next result says so."""
        lost = tuple(self._known_names)
        self._rebuild()
        self._pending_state, self._pending_lost = "lost", (*self._pending_lost, *lost)

    def _rebuild(self) -> None:
        """A whole new guest, set up. If that fails the session is over."""
        self._guest.close()
        try:
            self._check_open()
            self._guest = self._start()
            self._greet()
            self._set_up_again()
        except Exception as exc:
            if not self._closed:
                self._closed = True
                self._close_reason = "the session could not be rebuilt after a failure"
            raise SessionClosed(f"{self._close_reason}; open a new one") from exc

    def _set_up_again(self) -> None:
        """Setup and bindings in a fresh guest.

        Raises:
            GuestLost: the guest does not live through it, or setup fails this time (it may meet files an earlier cell left).
        """
        self._known_names = []
        self._handles = HandleTable()
        self._protected = self._protecting = self._has_standby = False
        self._stale = True
        self._setting_up = True
        try:
            self._configure()
            for name, binding in self._bindings.items():
                self._bind(name, binding)
        except SandboxError as exc:
            raise GuestLost(f"setting up a fresh guest failed ({exc})") from exc
        finally:
            self._setting_up = False


def _is_memory_error(end: TurnEnd) -> bool:
    return end.failure is not None and end.failure[0] == "MemoryError"
