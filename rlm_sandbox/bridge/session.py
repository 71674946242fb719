"""`Session`: `REPLProtocol` over a guest that is our own runner, apart from how that guest lives and is spoken to."""

from __future__ import annotations

import abc
import os
import sys
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from ..errors import ProtocolViolation, SandboxError, SessionBusy, SessionClosed, UnsendableValue
from ..limits import Limits
from ..protocol import Capabilities
from ..registry import SessionConfig
from ..results import ExecResult, OutputChunk, State, Usage
from ..wire.codec import Attachment, Encoder
from ..wire.frames import FrameTooLarge
from ..wire.messages import BindObject, Configure, Exec, Get, Message, Names, ReadFile, SetValue
from .arguments import as_source, checked_read, sendable
from .capture import Capture
from .exchange import TurnEnd, shown
from .guest import Death, GuestLost
from .handles import Binding, HandleTable
from .host_pool import HostPool
from .names import checked_name
from .one_call import Call, Mark, OneCall
from .verdict import from_guest, how_it_died, judge, killed_error, turn_error, worse

__all__ = ("Session",)

#: The echo of a cell; an honest guest cuts it at 20,000 and says so.
_MAX_ECHO_CHARS: Final = 20_100


class Session(abc.ABC):
    """A session. One call at a time, from any thread; `interrupt` and `close` may come concurrently.

    A subclass starts its guest, calls `_begin` and `_configure`, and supplies the methods of the next section.
    """

    def __init__(self, config: SessionConfig, capabilities: Capabilities) -> None:
        """
        Args:
            config: what the session was opened with.
            capabilities: what it declares.
        """
        self._freed = True
        self._owner = os.getpid()
        self._config = config
        self._capabilities = capabilities
        self._limits = config.limits
        self._calls = OneCall()
        self._closed = False
        self._close_reason = "the session was closed"
        self._interrupted = False
        self._running = False
        self._handles = self._new_handles()
        self._pool = HostPool()
        self._bindings: dict[str, Binding] = {}
        self._known_names: list[str] = []
        self._cell = 0
        self._protected = False
        self._setting_up = False
        self._out_of_step = False
        self._pending_state: State = "kept"
        self._pending_lost: tuple[str, ...] = ()
        self._until: float | None = None

    def _begin(self) -> None:
        """The guest is there: the session's time runs from here, for a container may take longer to start than it is to live."""
        seconds = self._limits.session_seconds
        self._until = None if seconds is None else time.monotonic() + seconds
        self._freed = False

    def begin(self) -> bool:
        """See `SupportsWaiting.begin`."""
        if self._closed or self._owner != os.getpid():
            return False
        self._begin()
        try:
            with self._call():
                return self._is_well()
        except SandboxError:
            return False

    # ---- what a subclass supplies

    @abc.abstractmethod
    def _run_turn(
        self, limits: Limits, capture: Capture, message: Message, attachments: list[Attachment], beside: Any, charged: float
    ) -> TurnEnd:
        """One turn; ``charged`` seconds of its clock are used up already. Raises `FrameTooLarge` if nothing was sent."""

    @abc.abstractmethod
    def _abandon_turn(self) -> None:
        """An exception of the host's own left a turn in the middle: its guest may not run on."""

    @abc.abstractmethod
    def _prepare(self, *, protect: bool = False) -> None:
        """Before a turn: the guest is in step, and, with ``protect``, its state of now can be recovered."""

    @abc.abstractmethod
    def _turn_ended(self) -> None:
        """A turn that was no cell ended well."""

    @abc.abstractmethod
    def _cell_ended(self, cpu_seconds: float | None) -> None:
        """A cell ended and its guest lives."""

    @abc.abstractmethod
    def _changed(self) -> None:
        """The guest's state was changed by a turn that was no cell."""

    @abc.abstractmethod
    def _check_memory(self, end: TurnEnd) -> float | None:
        """After a cell: its peak in MiB if memory ran out; ``end`` is changed if the next cell could not run."""

    @abc.abstractmethod
    def _recover(self, end: TurnEnd) -> tuple[State, tuple[str, ...], Death]:
        """After a turn that cost the guest: what became of the state, the names that were lost, how it died."""

    @abc.abstractmethod
    def _start_afresh(self) -> None:
        """An empty guest, set up. Raises `SessionClosed` if there is none to be had."""

    @abc.abstractmethod
    def _bind_text(self, name: str, target: Any) -> bool:
        """Bind a context or its whole text in the guest's own way; False if ``target`` is bound like any object."""

    @abc.abstractmethod
    def _wake_up(self) -> None:
        """Have a running turn look at what changed. From any thread."""

    @abc.abstractmethod
    def _free_guest(self) -> None:
        """End the guest and free what is its own. Never raises."""

    def _is_well(self) -> bool:
        """Whether a session that nobody has used yet has lived until now; the guest's own time begins anew, too."""
        return True

    def _new_handles(self) -> HandleTable:
        """The door to the host for a fresh guest."""
        return HandleTable()

    def _cpu_seconds(self) -> float | None:
        """CPU time of the guest so far, measured from outside."""
        return None

    def _burnt_between_turns(self, cpu_now: float | None) -> float:
        """CPU seconds the guest used since its last turn ended that its next cell is charged with."""
        return 0.0

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
        names = checked_read(code, read)
        narrowed = self._limits.narrowed(limits)
        with self._call():
            return self._exec(as_source(code), names, narrowed, on_output)

    def get(self, name: str, default: Any = None) -> Any:
        """See `REPLProtocol.get`."""
        with self._call():
            end = self._plain_turn(Get(checked_name(name)))
            return default if end.unknown else from_guest(end.value)

    def set(self, name: str, value: Any) -> None:
        """See `REPLProtocol.set`."""
        checked_name(name)
        encoder = Encoder(max_bytes=self._limits.value_bytes)
        tree = sendable(name, value, encoder.encode)
        with self._call():
            self._plain_turn(SetValue(name, tree), encoder.attachments)
            self._changed()

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """See `REPLProtocol.bind`."""
        checked_name(name)
        binding = Binding(target, inline, errors)
        with self._call():
            self._bind(name, binding)
            self._bindings[name] = binding
            self._changed()

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
            self._wake_up()

    def reset(self) -> None:
        """See `REPLProtocol.reset`."""
        with self._call():
            self._start_afresh()
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

    def _call(self) -> Call:
        return Call(sys._getframe(1), self._enter_call, self._leave_call)

    def _enter_call(self, call: Mark) -> None:
        if not self._calls.take(call):
            self._check_open()  # a `close` on another thread has it while it frees
            raise SessionBusy("the session is running another call; wait for it, or use one session per thread")
        try:
            self._check_open()
            self._interrupted, self._running = False, True
        except BaseException:
            self._leave_call(call)
            raise

    def _leave_call(self, call: Mark) -> None:
        self._running = False
        self._calls.give_back(call)
        self._free_if_closed()

    def _free_if_closed(self) -> None:
        """Whoever comes last frees: a `close` that found the session taken has left it to the call that has it."""
        if self._closed:
            call = Mark(sys._getframe())
            try:
                if self._calls.take(call):
                    self._free()
            finally:
                self._calls.give_back(call)

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
            self._free_guest()
            self._pool.close()

    # ---- turns

    def _turn(
        self,
        limits: Limits,
        capture: Capture,
        message: Message,
        attachments: list[Attachment],
        beside: Any = None,
        charged: float = 0.0,
    ) -> TurnEnd:
        # Whatever is raised from here on, a signal handler's SystemExit included, leaves a guest that is still in this turn
        # and would answer the next one with its end.
        self._out_of_step = True
        try:
            end = self._run_turn(limits, capture, message, attachments, beside, charged)
        except FrameTooLarge:
            self._out_of_step = False  # nothing was sent
            raise
        except BaseException:
            self._abandon_turn()
            raise
        self._out_of_step = end.kind != "done"
        return end

    def _is_interrupted(self) -> bool:
        """An interrupt is for the call, not for making its session whole again."""
        return self._closed or (self._interrupted and not self._setting_up)

    def _plain_turn(
        self,
        message: Message,
        attachments: list[Attachment] | None = None,
        beside: Any = None,
        *,
        limits: Limits | None = None,
    ) -> TurnEnd:
        """A turn that is not a cell: what goes wrong is raised. ``beside`` is what travels beside the message."""
        # Reading runs guest code (a repr), which is killed like a cell; it must not cost what was set since the last one.
        self._prepare(protect=isinstance(message, Get | Names | ReadFile))
        try:
            end = self._turn(limits or self._limits, Capture(0), message, attachments or [], beside)
        except FrameTooLarge as exc:
            raise UnsendableValue(f"this cannot be sent: {exc}; send it in parts") from None
        if end.kind == "done":
            self._note_names(end)
            self._turn_ended()
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
        started, cpu_before = time.monotonic(), self._cpu_seconds()
        charged = self._burnt_between_turns(cpu_before)
        try:
            end = self._turn(limits, capture, Exec(self._cell, code, read, limits.output_bytes), [], None, charged)
        except FrameTooLarge:
            raise ValueError("the cell's source is too long; bind a long text as a Context or set() it") from None
        if end.kind == "done" and not end.read.keys() <= set(read):
            end.kind, end.detail, end.read, end.failure = "violation", "it sent values nobody asked for", {}, None
        protected = protected and not end.unprotected
        death, peak, cpu_after = end.death, None, None
        if end.kind == "done":
            peak = self._check_memory(end)
        state, lost = self._take_pending()
        if end.kind == "done":
            cpu_after = self._cpu_seconds()
            self._note_names(end)
            self._cell_ended(cpu_after)
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
            stdout=capture.text("stdout") if capture.total else "",
            stderr=capture.text("stderr") if capture.total else "",
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

    def _note_names(self, end: TurnEnd) -> None:
        if end.names is not None:
            self._known_names = [shown(name, 200) for name in end.names[:10_000]]

    # ---- bindings

    def _configure(self) -> None:
        self._plain_turn(Configure(self._limits.output_bytes, self._limits.value_bytes, as_source(self._config.setup)))

    def _bind(self, name: str, binding: Binding) -> None:
        if self._bind_text(name, binding.target):
            return
        mark = self._handles.mark()
        kind, reference = self._handles.add(name, binding.target, inline=binding.inline, errors=binding.errors)
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

    def _set_up_again(self) -> None:
        """Setup and bindings in a fresh guest.

        Raises:
            GuestLost: the guest does not live through it, or setup fails this time (it may meet files an earlier cell left).
        """
        self._known_names = []
        self._handles = self._new_handles()
        self._protected = False
        self._setting_up = True
        try:
            self._configure()
            for name, binding in self._bindings.items():
                self._bind(name, binding)
        except SandboxError as exc:
            raise GuestLost(f"setting up a fresh guest failed ({exc})") from exc
        finally:
            self._setting_up = False
