"""`FramedSession`: `REPLProtocol` over any `Guest` that speaks frames. Used by every backend whose guest is our runner."""

from __future__ import annotations

import logging
import os
import socket
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ..context import Context, DataContext, WholeText
from ..errors import (
    BackendUnavailable,
    GuestCrashed,
    SessionClosed,
)
from ..limits import Limits
from ..protocol import Capabilities
from ..registry import SessionConfig
from ..results import LimitHit, State
from ..wire.codec import Attachment, Encoder
from ..wire.frames import dump_frame
from ..wire.messages import BindData, BindText, Message, Protect, ReadFile, dump_message
from .capture import Capture
from .exchange import TurnEnd
from .guest import Death, Guest, GuestLost
from .guest_files import checked_path, collect
from .readiness import Readiness, becomes_ready
from .session import Session
from .turn import Turn, WakePipe
from .verdict import worse

__all__ = ("STANDBY_HELLO_SECONDS", "FramedSession")

log: Final = logging.getLogger("rlm_sandbox.session")

#: A heap that leaves less than this after a cell is given up for the recovery point: no cell could run in it.
_HEADROOM_MB: Final = 8
_HEADROOM_SHARE: Final = 0.02
#: CPU that making a standby may cost a worker between turns (1 GB of small objects: 60 ms). More is charged to the next cell.
_FREE_CPU_SECONDS: Final = 0.25
_HELLO_SECONDS: Final = 10.0
#: A standby is the cell's own memory: what the cell did to it may keep it from greeting, and recovery has 2 s.
STANDBY_HELLO_SECONDS: Final = 1.5
#: The supervisor's own deadline is shorter; this one catches a supervisor that is gone or hung.
_PROTECT_SECONDS: Final = 5.0
#: Between two turns there are a ticket's answer, a death or two, and a standby's; a supervisor that says more has gone wrong.
_MAX_REPORTS: Final = 8
_PROTECT: Final = b"".join(dump_frame(dump_message(Protect()), [], max_bytes=1 << 20))


class FramedSession(Session):
    """A session over a guest process. See `Session`."""

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
        super().__init__(config, capabilities)
        self._start = start
        self._protecting = False
        self._has_standby = False
        self._cpu_at_end: float | None = None
        self._stale = True
        #: Whether a guest was being replaced when something was raised (Ctrl-C, say): what there is now cannot be used.
        self._unfinished = False
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
        self._readiness = Readiness(self._wake.read_fd)
        self._begin()
        try:
            self._set_up_first()
        except BaseException:
            self.close()
            raise

    def _set_up_first(self) -> None:
        self._greet()
        self._configure()

    def read_file(self, name: str) -> bytes:
        """The content of a file below the guest's ``/tmp``, capped at ``value_bytes``. See `SupportsReadFile`."""
        path = checked_path(name)

        def read(offset: int, size: int) -> object:
            return self._plain_turn(ReadFile(path, offset, size)).value

        with self._call():
            return collect(read, self._limits.value_bytes)

    # ---- what the session asks of its guest

    def _run_turn(
        self, limits: Limits, capture: Capture, message: Message, attachments: list[Attachment], beside: Any, charged: float
    ) -> TurnEnd:
        turn = Turn(
            self._guest, self._handles, self._pool, self._wake, self._readiness,
            limits, capture, self._is_interrupted, self._until, charged,
        )  # fmt: skip
        self._begin_turn(turn)
        end = turn.run(message, attachments, beside or ())
        if end.unprotected:
            self._protected = self._has_standby = False
            self._stale = True
        return end

    def _begin_turn(self, turn: Turn) -> None:
        """The last word before a turn."""

    def _abandon_turn(self) -> None:
        self._guest.stop()

    def _turn_ended(self) -> None:
        self._guest.stop()
        self._cpu_at_end = self._guest.cpu_seconds()  # what this turn used was on its own clock

    def _cell_ended(self, cpu_seconds: float | None) -> None:
        self._cpu_at_end = cpu_seconds
        self._protect()

    def _changed(self) -> None:
        self._stale = True

    def _cpu_seconds(self) -> float | None:
        return self._guest.cpu_seconds()

    def _wake_up(self) -> None:
        self._wake.wake()

    def _free_guest(self) -> None:
        self._guest.close()
        self._wake.close()

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        """While there is no guest that could be used. What is raised in here leaves it at that: the next call has a new one."""
        self._unfinished = True
        yield
        self._unfinished = False

    def _start_afresh(self) -> None:
        if self._unfinished:
            self._rebuild()
            return
        with self._replacing():
            try:
                self._await_protection()
                self._guest.recover(fresh=True)
                self._greet()
                self._set_up_again()
            except GuestLost:
                self._rebuild()

    def _is_well(self) -> bool:
        if self._unfinished:
            return False
        try:
            self._guest.restart_clock(self._limits.session_seconds)
            self._await_protection()
        except GuestLost:
            return False
        return self._pending_state == "kept" and not self._spoke_between_turns()

    def _check_memory(self, end: TurnEnd) -> float | None:
        peak = None
        # Without a recovery point a full heap is kept, and what it leaves the next cell changes nothing.
        out_of_memory = self._out_of_memory() if self._has_standby else None
        if out_of_memory is not None or _is_memory_error(end):
            peak = self._guest.peak_memory_mb()
        if out_of_memory is not None:
            end.kind = "killed"
            if not _is_memory_error(end):
                end.hit = out_of_memory
        return peak

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

    def _bind_text(self, name: str, target: Any) -> bool:
        if isinstance(target, DataContext):
            return self._guest.maps_contexts and self._bind_data(name, target)
        whole = isinstance(target, WholeText)
        context = target.context if isinstance(target, WholeText) else target
        if not isinstance(context, Context) or not (self._guest.maps_contexts or whole):
            return False
        stored = context.memory_file()
        encoder = Encoder()
        spans = encoder.encode(array("Q", context.spans).tobytes())
        meta = encoder.encode(context.added_metadata)
        self._bind_stored(BindText(name, whole, stored.chars, stored.width, stored.ascii_only, spans, meta), encoder, context)
        return True

    def _bind_data(self, name: str, data: DataContext) -> bool:
        encoder = Encoder()
        manifest = encoder.encode(data.manifest)
        self._bind_stored(BindData(name, data.kind, len(data), manifest), encoder, data)
        return True

    def _bind_stored(self, message: Message, encoder: Encoder, context: Context | DataContext) -> None:
        """Send a message with the descriptor of what is to be mapped."""
        stored = context.memory_file()
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
        turn = Turn(
            self._guest, self._handles, self._pool, self._wake, self._readiness, self._limits, Capture(0), lambda: False, None
        )
        turn.expect_hello(seconds)
        self._out_of_step = False

    def _protect(self, *, wanted: bool | None = None) -> None:
        """Begin to make a standby of the present state, if the session has such or it is ``wanted``; the worker is stopped then."""
        self._protected, self._stale = False, False
        if not (self._config.recovery if wanted is None else wanted):
            self._guest.stop()
            return
        self._protecting = True  # first: after a Ctrl-C in the middle of this the supervisor's answer is still to be waited for
        try:
            self._guest.request_protection()
            self._guest.data.sendall(_PROTECT)
        except (GuestLost, OSError):
            self._protecting = False
            self._out_of_step = True  # it closed its channel, say: the next cell gets another worker
            self._guest.stop()

    def _await_protection(self) -> None:
        """Wait for the standby that is being made, and take what the supervisor reported meanwhile."""
        until = time.monotonic() + _PROTECT_SECONDS
        for _ in range(_MAX_REPORTS):
            left = until - time.monotonic() if self._protecting else 0.0
            if not becomes_ready(self._guest, self._guest.control_fd, left):
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
            if self._unfinished and not self._setting_up:
                self._lose()
            if self._out_of_step:
                self._recover_between(Death(why="its last turn was abandoned"))
            if self._protecting:
                self._await_protection()
            unprotected = protect and self._stale and self._config.recovery
            # The usual case, by one look: nothing happened since the last turn.
            if not unprotected and not self._closed and not self._readiness.look(self._guest, 0):
                return
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
        with self._replacing():
            try:
                # A standby that lacks what was set or bound since is not what the session was before this call.
                recovery = self._guest.recover(fresh=not had_standby or self._stale)
                self._greet(STANDBY_HELLO_SECONDS if recovery.state == "restored" else _HELLO_SECONDS)
                death = recovery.death if recovery.death.status is not None else end.death
                if recovery.state != "restored":
                    self._set_up_again()
                    return "lost", lost, death
            except GuestLost as exc:
                log.warning("a guest was lost: %s", exc)
                try:
                    self._rebuild()
                except SessionClosed:  # later calls say so; this one has its result
                    log.warning("the session could not be rebuilt", exc_info=True)
                return "lost", lost, end.death
        self._protect()
        return "restored", (), death

    def _lose(self) -> None:
        """The guest is gone between turns. The next result says so."""
        lost = tuple(self._known_names)
        self._rebuild()
        self._pending_state, self._pending_lost = "lost", (*self._pending_lost, *lost)

    def _rebuild(self) -> None:
        """A whole new guest, set up. If that fails the session is over."""
        with self._replacing():
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
        self._protecting = self._has_standby = False
        self._stale = True
        super()._set_up_again()


def _is_memory_error(end: TurnEnd) -> bool:
    return end.failure is not None and end.failure[0] == "MemoryError"
