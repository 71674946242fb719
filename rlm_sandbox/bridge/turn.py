"""One turn on a framed guest: a request goes out, output and host calls come and go, and it ends in exactly one way."""

from __future__ import annotations

import array
import collections
import contextlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..limits import Limits
from ..waiting import piece
from ..wire.codec import Attachment, WireError
from ..wire.frames import FrameReader, dump_frame
from ..wire.messages import (
    Hello,
    Message,
    dump_message,
    load_message,
)
from .capture import Capture
from .exchange import Exchange, TurnEnd
from .guest import Guest, GuestLost
from .handles import HandleTable
from .host_pool import HostPool
from .readiness import Readiness, becomes_ready

__all__ = ("Turn", "WakePipe")

#: Received at first, and after a read that filled it: a block of the larger size is mapped and unmapped by the allocator each time.
_FIRST_CHUNK: Final = 1 << 14
_CHUNK: Final = 1 << 18
#: What a pipe holds, unless somebody enlarged it.
_OUTPUT_CHUNK: Final = 1 << 16
_NO_CAP: Final = 1 << 40
#: Reads between two looks at the deadlines, so that a guest that never stops sending cannot keep the loop from them.
_READS: Final = 16
#: How often a turn looks whether memory is short.
_RELIEF_SECONDS: Final = 0.1
#: Between the end of a worker's channel and its supervisor's word of its death.
_DEATH_SECONDS: Final = 0.5
#: The poll call takes milliseconds as a C int.
_LONGEST_WAIT_SECONDS: Final = 3_600.0


class WakePipe:
    """Wakes a session's poll loop from other threads. Writing never blocks."""

    def __init__(self) -> None:
        # A late answer may come while the session is closed: without the lock its byte could go to whoever got the number next.
        # Reentrant, because a signal handler that interrupts a session may come in the middle of it.
        self._lock = threading.RLock()
        self._closed = False
        self.read_fd, self._write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        os.set_blocking(self._write_fd, False)

    def wake(self) -> None:
        """Make the poll loop look at its queues."""
        with self._lock, contextlib.suppress(BlockingIOError):  # full: a wake-up is already there
            if not self._closed:
                os.write(self._write_fd, b"\0")

    def drain(self) -> None:
        """Take the wake-ups that are there."""
        try:
            while len(os.read(self.read_fd, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Free both ends. Idempotent; a later `wake` does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.read_fd)
                os.close(self._write_fd)


class Turn(Exchange):
    """Runs one request. Made for one turn and thrown away."""

    _outbox_fds: tuple[int, ...] = ()
    _ended_outputs: frozenset[int] = frozenset()
    _printed = True
    _unprotected = False
    _relieve: Callable[[], None] | None = None
    _relieve_at = math.inf

    def __init__(
        self,
        guest: Guest,
        handles: HandleTable,
        pool: HostPool,
        wake: WakePipe,
        readiness: Readiness,
        limits: Limits,
        capture: Capture,
        is_interrupted: Callable[[], bool],
        session_until: float | None,
        charged: float = 0.0,
    ) -> None:
        """``charged``: seconds of the turn clock that are used up already."""
        super().__init__(handles, pool, limits, capture, is_interrupted, session_until, charged)
        self._guest = guest
        self._wake = wake
        self._readiness = readiness
        self._reader = FrameReader(max_bytes=self._max_frame)
        self._outbox: collections.deque[memoryview] = collections.deque()

    def relieve_with(self, relieve: Callable[[], None]) -> None:
        """Call this a few times each second of the turn: there is a recovery point that can be given up for its memory."""
        self._relieve, self._relieve_at = relieve, time.monotonic() + _RELIEF_SECONDS

    def run(self, message: Message, attachments: Sequence[Attachment] = (), fds: tuple[int, ...] = ()) -> TurnEnd:
        """Send a request and see its turn through. Never raises for anything the guest does.

        Raises:
            FrameTooLarge: the request itself is too large; nothing was sent.
        """
        try:
            end = self.measured(self._run(message, list(attachments), fds))
            end.unprotected = self._unprotected
            if end.kind != "done" or self._printed:
                self.drain_output()
            return end
        finally:
            self.close()

    def _run(self, message: Message, attachments: list[Attachment], fds: tuple[int, ...]) -> TurnEnd:
        self._outbox_fds = fds
        self._hand_over(message, attachments)
        self._guest.wake()
        return self.seen_through()

    def expect_hello(self, seconds: float) -> None:
        """Wait for the greeting of a new worker on a new channel. Raises `GuestLost` if it does not come."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and becomes_ready(self._guest, self._guest.data.fileno(), left):
            try:
                frame = self._read_frame()
                if frame is not None:
                    load_message(frame[0], (Hello,))
                    return
            except WireError as exc:
                raise GuestLost(f"the new worker broke the protocol: {exc}") from None
            except EOFError:
                break
        raise GuestLost("the new worker did not report")

    # ---- the loop

    def _step(self) -> TurnEnd | None:
        now = time.monotonic()
        end = self.check_deadlines(now)
        if end is not None:
            return end
        wait = self.wait_seconds(now)
        if self._relieve is not None:
            if now >= self._relieve_at:
                self._relieve()
                self._relieve_at = now + _RELIEF_SECONDS
            wait = self._relieve_at - now if wait is None else min(wait, self._relieve_at - now)
        wait = piece(wait)
        events = self._readiness.look(
            self._guest,
            None if wait is None else math.ceil(min(wait, _LONGEST_WAIT_SECONDS) * 1000),
            writing=bool(self._outbox),
            without=self._ended_outputs,
        )
        data_fd = self._guest.data.fileno()
        return self._react(events, data_fd)

    def _react(self, events: dict[int, int], data_fd: int) -> TurnEnd | None:
        if self._wake.read_fd in events:
            self._wake.drain()
        printed = False
        for fd in self._guest.outputs:
            if fd in events:
                printed = True
                self._read_output(fd)
        if data_fd in events:
            if (
                not self._reader.mid_frame
            ):  # see `Readiness`: what it printed before this frame was there to be seen, if there was any
                self._printed = printed
            if events[data_fd] & select.POLLOUT:
                self._flush()
            if events[data_fd] & (select.POLLIN | select.POLLHUP):
                try:
                    frame = self._read_frame()
                except EOFError:
                    frame = None
                    if self._guest.control_fd not in events:
                        return self._await_death()
                if frame is not None:
                    return self._on_frame(*frame)
                if self._reader.mid_frame and not self.guest_holds_turn:
                    raise WireError("it sent something out of turn")
        if self._guest.control_fd in events:
            report = self._guest.report()
            if report is not None and report.kind == "died":
                return TurnEnd("died", death=report.death, detail=report.death.why)
            if report is not None and report.kind == "standby_died":
                self._unprotected, self._relieve = True, None
            elif report is not None:
                raise GuestLost("the supervisor reported what nobody asked for")
        return None

    def _await_death(self) -> TurnEnd:
        """The data channel ended: the supervisor tells how, or the worker closed it and is killed."""
        if becomes_ready(self._guest, self._guest.control_fd, _DEATH_SECONDS):
            report = self._guest.report()
            if report is not None and report.kind == "died":
                return TurnEnd("died", death=report.death)
        return TurnEnd("violation", detail="it closed its channel")

    # ---- bytes

    def _on_frame(self, header: Any, attachments: list[Attachment]) -> TurnEnd | None:
        if self.guest_holds_turn and self._outbox:
            raise WireError("it answered before it had read what it was sent")
        return self.on_message(header, attachments, self._reader.frame_bytes)

    def _deliver(self, message: Message, attachments: list[Attachment]) -> None:
        buffers = dump_frame(dump_message(message), attachments, max_bytes=_NO_CAP)
        if len(buffers) > 1 or self._outbox or self._outbox_fds:
            self._outbox.extend(memoryview(buffer) for buffer in buffers if buffer)
            self._flush()
            return
        (frame,) = buffers
        try:
            sent = self._guest.data.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the worker is gone; reading says how
        if sent < len(frame):
            self._outbox.append(memoryview(frame)[sent:])

    def _delivered(self) -> bool:
        return not self._outbox

    def _interrupt_guest(self) -> None:
        self._guest.interrupt()

    def _cpu_seconds(self) -> float | None:
        return self._guest.cpu_seconds()

    def _wake_up(self) -> None:
        self._wake.wake()

    def _flush(self) -> None:
        while self._outbox:
            ancillary = []
            if self._outbox_fds:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._outbox_fds))]
            try:
                sent = self._guest.data.sendmsg([self._outbox[0]], ancillary)
            except BlockingIOError:
                return
            except OSError:
                self._outbox.clear()  # the worker is gone; reading says how
                return
            self._outbox_fds = ()
            if sent == len(self._outbox[0]):
                self._outbox.popleft()
            else:
                self._outbox[0] = self._outbox[0][sent:]

    def _read_frame(self) -> tuple[Any, list[Attachment]] | None:
        """One frame if it is there. Raises EOFError at the end of the stream, WireError for a breach."""
        chunk = _FIRST_CHUNK
        for _ in range(_READS):
            try:
                data = self._guest.data.recv(chunk)
            except BlockingIOError:
                return None
            except OSError:
                raise EOFError from None
            if not data:
                raise EOFError
            whole = self._reader.whole(data)
            if whole is not None:
                return whole
            view = memoryview(data)
            while view:
                take = min(len(view), self._reader.wanted)
                frame = self._reader.feed(view[:take])
                view = view[take:]
                if frame is not None:
                    if view:
                        raise WireError("it sent more after the end of its turn")
                    return frame
            if len(data) < chunk:
                break
            chunk = _CHUNK
        return None

    def _read_output(self, fd: int) -> None:
        """One bounded read, so that a flood cannot keep the loop from its deadlines."""
        try:
            data = os.read(fd, _OUTPUT_CHUNK)
        except (BlockingIOError, OSError):
            return
        if data:
            self._capture.add(self._guest.outputs[fd], data)
        else:  # no one can write to it any more: it would be ready for ever
            self._ended_outputs |= {fd}

    def drain_output(self) -> None:
        """What is in the pipes now belongs to this turn: the guest wrote it before the turn ended."""
        for fd, stream in self._guest.outputs.items():
            for _ in range(_READS):  # a pipe holds 64 KiB; more means that somebody still writes
                try:
                    data = os.read(fd, _OUTPUT_CHUNK)
                except (BlockingIOError, OSError):
                    break
                if not data:
                    break
                self._capture.add(stream, data)
