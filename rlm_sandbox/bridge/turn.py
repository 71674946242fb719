"""One turn on a framed guest: a request goes out, output and host calls come and go, and it ends in exactly one way.

Everything the guest sends is checked against the turn rules of ``wire.messages``; the first breach ends the guest.
"""

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
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ..limits import Limits
from ..results import LimitHit
from ..wire.codec import MAX_ELEMENTS, Attachment, Decoder, Encoder, ValueRefused, WireError
from ..wire.frames import FrameReader, FrameTooLarge, dump_frame
from ..wire.messages import (
    FRAME_OVERHEAD,
    MAX_CALLS_PER_SUSPENSION,
    Done,
    Forget,
    Hello,
    Message,
    Resume,
    Suspend,
    dump_message,
    load_message,
)
from .capture import Capture
from .guest import Death, Guest, GuestLost
from .handles import HOST_CALL_ERROR, CallFailed, CallRefused, HandleTable, HostCall, Outcome, run_call
from .host_pool import HostPool
from .watchdog import Watchdog

__all__ = ("Turn", "TurnEnd", "WakePipe", "shown")

_CHUNK: Final = 1 << 18
#: While guest threads may still have calls to add, the turn goes back to them after this long, then at doubled intervals.
_JOIN_FIRST_SECONDS: Final = 0.001
_JOIN_LAST_SECONDS: Final = 0.02
_NO_CAP: Final = 1 << 40
#: Reads between two looks at the deadlines, so that a guest that never stops sending cannot keep the loop from them.
_READS: Final = 16
#: The poll call takes milliseconds as a C int.
_LONGEST_WAIT_SECONDS: Final = 3_600.0
#: What an element of a decoded value may cost the host, beside its bytes in the frame.
_ELEMENT_BYTES: Final = 100


def shown(text: str, limit: int) -> str:
    """The guest's own words for a person to read: cut, and valid Unicode, so that whoever writes them out does not fail."""
    return text[:limit].encode("utf-8", "backslashreplace").decode()


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


@dataclass(slots=True)
class TurnEnd:
    """How a turn ended. ``kind``: ``done``; or the guest must be recovered: ``killed``, ``died``, ``violation``."""

    kind: Literal["done", "killed", "died", "violation"]
    value: Any = None
    read: dict[str, Any] = field(default_factory=dict)
    failure: tuple[str, str, str] | None = None
    unknown: bool = False
    names: list[str] | None = None
    hit: LimitHit | None = None
    interrupted: bool = False
    host_interrupted: bool = False
    death: Death = field(default_factory=Death)
    detail: str = ""
    turn_seconds: float = 0.0
    host_calls: int = 0


class Turn:
    """Runs one request. Made for one turn and thrown away."""

    def __init__(
        self,
        guest: Guest,
        handles: HandleTable,
        pool: HostPool,
        wake: WakePipe,
        limits: Limits,
        capture: Capture,
        is_interrupted: Callable[[], bool],
        session_until: float | None,
        charged: float = 0.0,
    ) -> None:
        """``charged``: seconds of the turn clock that are used up already."""
        self._guest = guest
        self._handles = handles
        self._pool = pool
        self._wake = wake
        self._limits = limits
        self._capture = capture
        self._is_interrupted = is_interrupted
        self._watchdog = Watchdog(limits, time.monotonic(), session_until, _used=charged)
        self._max_frame = _NO_CAP if limits.value_bytes is None else limits.value_bytes + FRAME_OVERHEAD
        self._reader = FrameReader(max_bytes=self._max_frame)
        self._outbox: collections.deque[memoryview] = collections.deque()
        self._outbox_fds: tuple[int, ...] = ()
        self._outstanding: dict[int, HostCall] = {}
        self._weights: dict[int, int] = {}
        self._weight = 0
        self._ended_outputs: set[int] = set()
        self._answers: collections.deque[tuple[int, Outcome]] = collections.deque()
        self._last_call = 0
        self._join_at: float | None = None
        self._join_interval = _JOIN_FIRST_SECONDS
        self._guest_holds_turn = False
        self._host_interrupted = False
        self._interrupt_seen = False
        self._host_calls = 0
        self._closed = False

    def run(self, message: Message, attachments: Sequence[Attachment] = (), fds: tuple[int, ...] = ()) -> TurnEnd:
        """Send a request and see its turn through. Never raises for anything the guest does.

        Raises:
            FrameTooLarge: the request itself is too large; nothing was sent.
        """
        buffers = dump_frame(dump_message(message), list(attachments), max_bytes=_NO_CAP)
        try:
            return self._finish(self._run(buffers, fds))
        finally:
            self._closed = True  # answers that come from now on are refused
            self._pool.drop_queued()  # and calls that have not begun never do: nobody waits for them

    def _run(self, buffers: list[bytes], fds: tuple[int, ...]) -> TurnEnd:
        if self._peek():
            return TurnEnd("violation", detail="it sent something between turns")
        self._outbox_fds = fds
        self._queue(buffers)
        self._guest.wake()
        end: TurnEnd | None = None
        while end is None:
            try:
                end = self._step()
            except KeyboardInterrupt:
                self._host_interrupted = True
            except WireError as exc:
                end = TurnEnd("violation", detail=str(exc))
            except GuestLost as exc:
                end = TurnEnd("died", detail=str(exc))
        return end

    def expect_hello(self, seconds: float) -> None:
        """Wait for the greeting of a new worker on a new channel. Raises `GuestLost` if it does not come."""
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._guest.data, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if not poll.poll(left * 1000):
                break
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

    def _finish(self, end: TurnEnd) -> TurnEnd:
        now = time.monotonic()
        end.hit = self._watchdog.hit
        end.interrupted = self._interrupt_seen
        end.host_interrupted = self._host_interrupted
        end.turn_seconds = self._watchdog.turn_seconds(now, None)
        end.host_calls = self._host_calls
        self.drain_output()
        return end

    def _step(self) -> TurnEnd | None:
        now = time.monotonic()
        cpu = None if self._guest_holds_turn else self._guest.cpu_seconds()
        verdict = self._watchdog.check(now, cpu)
        if not self._watchdog.ending and (self._host_interrupted or self._is_interrupted()):
            self._interrupt_seen = True
            verdict = self._watchdog.end(now)
        if verdict == "kill":
            return TurnEnd("killed")
        if verdict == "interrupt":
            self._end_softly()
        if not self._guest_holds_turn:
            self._send_answers()
        poll = select.poll()
        poll.register(self._wake.read_fd, select.POLLIN)
        poll.register(self._guest.control_fd, select.POLLIN)
        for fd in self._guest.outputs:
            if fd not in self._ended_outputs:
                poll.register(fd, select.POLLIN)
        data_fd = self._guest.data.fileno()
        poll.register(data_fd, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        wait = self._watchdog.wait_seconds(now)
        if self._join_at is not None and not self._guest_holds_turn:
            wait = max(0.0, self._join_at - now) if wait is None else min(wait, max(0.0, self._join_at - now))
        events = dict(poll.poll(None if wait is None else math.ceil(min(wait, _LONGEST_WAIT_SECONDS) * 1000)))
        return self._react(events, data_fd)

    def _react(self, events: dict[int, int], data_fd: int) -> TurnEnd | None:
        if self._wake.read_fd in events:
            self._wake.drain()
        for fd in self._guest.outputs:
            if fd in events:
                self._read_output(fd)
        if data_fd in events:
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
                if self._reader.mid_frame and not self._guest_holds_turn:
                    raise WireError("it sent something out of turn")
        if self._guest.control_fd in events:
            report = self._guest.report()
            if report is not None and report.kind == "died":
                return TurnEnd("died", death=report.death, detail=report.death.why)
            if report is not None and report.kind != "standby_died":
                raise GuestLost("the supervisor reported what nobody asked for")
        return None

    def _await_death(self) -> TurnEnd:
        """The data channel ended: the supervisor tells how, or the worker closed it and is killed."""
        poll = select.poll()
        poll.register(self._guest.control_fd, select.POLLIN)
        if poll.poll(500):
            report = self._guest.report()
            if report is not None and report.kind == "died":
                return TurnEnd("died", death=report.death)
        return TurnEnd("violation", detail="it closed its channel")

    def _on_frame(self, header: Any, attachments: list[Attachment]) -> TurnEnd | None:
        if not self._guest_holds_turn:
            raise WireError("it sent something out of turn")
        if self._outbox:
            raise WireError("it answered before it had read what it was sent")
        message = load_message(header, (Done, Suspend))
        now = time.monotonic()
        if isinstance(message, Suspend):
            self._guest_holds_turn = False
            self._watchdog.host_turn(now, self._guest.cpu_seconds())
            self._on_suspend(message, attachments)
            return None
        assert isinstance(message, Done)
        self._watchdog.host_turn(now, None)
        self._check_size(attachments)
        decoder = Decoder(attachments)
        value = decoder.decode(message.value)
        read = decoder.decode(message.read)
        if read is not None and type(read) is not dict:
            raise WireError("what was read is malformed")
        failure = message.failure
        if failure is not None and len(failure) != 3:
            raise WireError("a failure is malformed")
        return TurnEnd(
            "done",
            value=value,
            read=read or {},
            failure=None if failure is None else (shown(failure[0], 200), shown(failure[1], 5_000), shown(failure[2], 20_000)),
            unknown=message.unknown,
            names=message.names,
        )

    def _check_size(self, attachments: list[Attachment]) -> None:
        """An honest guest refuses such a value itself, with an error the cell sees."""
        cap = self._limits.value_bytes
        if cap is not None and sum(map(len, attachments)) > cap:
            raise WireError("it sent values larger than value_bytes")

    def _end_softly(self) -> None:
        self._guest.interrupt()
        if not self._guest_holds_turn and not self._outbox:
            self._forget()

    def _forget(self) -> None:
        """Give the turn back without answers; what the host functions still return is refused."""
        self._outstanding.clear()
        self._weights.clear()
        self._weight = 0
        self._answers.clear()
        self._pool.drop_queued()
        self._queue(dump_frame(dump_message(Forget("the cell was interrupted")), [], max_bytes=_NO_CAP))

    # ---- host calls

    def _on_suspend(self, message: Suspend, attachments: list[Attachment]) -> None:
        if len(message.calls) > MAX_CALLS_PER_SUSPENSION:
            raise WireError("too many calls in one suspension")
        self._check_size(attachments)
        if not message.calls and not self._outstanding and not self._watchdog.ending:
            raise WireError("it waits for answers to no call")
        decoder = Decoder(attachments)
        calls = [self._checked_call(fields, decoder) for fields in message.calls]
        # Weighed before any is started: calls that wait hold their arguments, and a guest can add to them for ever.
        weight = self._reader.frame_bytes + _ELEMENT_BYTES * decoder.elements
        allowed = None if self._limits.value_bytes is None else self._max_frame + _ELEMENT_BYTES * MAX_ELEMENTS
        too_much = allowed is not None and self._weight + weight > allowed
        for number, handle, method, args, kwargs in calls:
            self._start_call(number, handle, method, args, kwargs, weight // len(calls), too_much)
        self._join_at = None
        if message.more:
            self._join_interval = _JOIN_FIRST_SECONDS if message.calls else min(2 * self._join_interval, _JOIN_LAST_SECONDS)
            self._join_at = time.monotonic() + self._join_interval
        if self._watchdog.ending:
            self._forget()

    def _checked_call(self, fields: list[Any], decoder: Decoder) -> tuple[int, int, str | None, Any, Any]:
        if len(fields) != 5 or type(fields[0]) is not int or type(fields[1]) is not int or type(fields[2]) not in (str, type(None)):
            raise WireError("a host call is malformed")
        number, handle, method = fields[:3]
        if number <= self._last_call:
            raise WireError("a host call's number was used before")
        self._last_call = number
        return number, handle, method, decoder.decode(fields[3]), decoder.decode(fields[4])

    def _start_call(
        self, number: int, handle: int, method: str | None, args: Any, kwargs: Any, weight: int, too_much: bool
    ) -> None:
        self._host_calls += 1
        allowed = self._limits.host_calls
        if allowed is not None and self._host_calls > allowed and not self._watchdog.ending:
            self._watchdog.end(time.monotonic(), LimitHit("host_calls", allowed, self._host_calls, "host"))
            self._guest.interrupt()
        if self._watchdog.ending:
            return
        try:
            if too_much:
                raise CallRefused("the arguments of all calls under way are too large together; make fewer at once")
            call = self._handles.resolve(handle, method, args, kwargs)
        except CallRefused as exc:
            self._answers.append((number, CallFailed(HOST_CALL_ERROR, str(exc))))
            return
        self._outstanding[number] = call
        self._weights[number] = weight
        self._weight += weight
        if call.inline:
            self._answers.append((number, run_call(call)))
        else:
            self._pool.submit(call, lambda outcome: self._on_outcome(number, outcome))

    def _on_outcome(self, number: int, outcome: Outcome) -> None:
        """On a pool thread."""
        if not self._closed:
            self._answers.append((number, outcome))
            self._wake.wake()

    def _send_answers(self) -> None:
        joining = self._join_at is not None and time.monotonic() >= self._join_at
        if self._watchdog.ending or not (self._answers or joining):
            return
        encoder = Encoder(self._handles.export, max_bytes=self._limits.value_bytes)
        answers: list[list[Any]] = []
        while self._answers:
            number, outcome = self._answers.popleft()
            call = self._outstanding.pop(number, None)
            self._weight -= self._weights.pop(number, 0)
            if isinstance(outcome, CallFailed):
                answers.append([number, None, [outcome.type_name, outcome.message]])
                continue
            mark, kept = self._handles.mark(), len(encoder.attachments)
            encoder.allow(self._limits.value_bytes)
            try:
                answers.append([number, encoder.encode(outcome.value), None])
            except Exception as exc:  # noqa: BLE001 - foreign classes, and dicts that other threads change, raise what they like
                self._handles.drop_since(mark)
                del encoder.attachments[kept:]
                name = call.name if call is not None else "the host function"
                why = f": {exc}" if isinstance(exc, ValueRefused) else ""
                answers.append([number, None, [HOST_CALL_ERROR, f"{name} returned a value that cannot be sent{why}"]])
        try:
            self._queue(dump_frame(dump_message(Resume(answers)), encoder.attachments, max_bytes=_NO_CAP))
        except FrameTooLarge:
            failed = [[number, None, [HOST_CALL_ERROR, "the answers are too large to be sent"]] for number, _, _ in answers]
            self._queue(dump_frame(dump_message(Resume(failed)), [], max_bytes=_NO_CAP))

    # ---- bytes

    def _queue(self, buffers: list[bytes]) -> None:
        """Send a frame, which gives the guest the turn."""
        self._outbox.extend(memoryview(buffer) for buffer in buffers if buffer)
        self._guest_holds_turn = True
        self._watchdog.guest_turn(time.monotonic(), self._guest.cpu_seconds())
        self._flush()

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
        for _ in range(_READS):
            try:
                data = self._guest.data.recv(_CHUNK)
            except BlockingIOError:
                return None
            except OSError:
                raise EOFError from None
            if not data:
                raise EOFError
            view = memoryview(data)
            while view:
                take = min(len(view), self._reader.wanted)
                frame = self._reader.feed(view[:take])
                view = view[take:]
                if frame is not None:
                    if view:
                        raise WireError("it sent more after the end of its turn")
                    return frame
            if len(data) < _CHUNK:
                break
        return None

    def _peek(self) -> bool:
        """Whether the guest sent something before it was asked."""
        try:
            return bool(self._guest.data.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        except OSError:
            return False

    def _read_output(self, fd: int) -> None:
        """One bounded read, so that a flood cannot keep the loop from its deadlines."""
        try:
            data = os.read(fd, _CHUNK)
        except (BlockingIOError, OSError):
            return
        if data:
            self._capture.add(self._guest.outputs[fd], data)
        else:  # no one can write to it any more: it would be ready for ever
            self._ended_outputs.add(fd)

    def drain_output(self) -> None:
        """What is in the pipes now belongs to this turn: the guest wrote it before the turn ended."""
        for fd, stream in self._guest.outputs.items():
            for _ in range(_READS):  # a pipe holds 64 KiB; more means that somebody still writes
                try:
                    data = os.read(fd, _CHUNK)
                except (BlockingIOError, OSError):
                    break
                if not data:
                    break
                self._capture.add(stream, data)
