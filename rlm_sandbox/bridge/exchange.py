"""`Exchange`: one turn with a guest, apart from what carries its messages: its deadlines, its host calls, its rules.

Everything the guest sends is checked against the turn rules of ``wire.messages``; the first breach ends the guest.
"""

from __future__ import annotations

import abc
import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ..limits import Limits
from ..results import LimitHit
from ..wire.codec import MAX_ELEMENTS, MAX_JSON_INT, Attachment, Decoder, Encoder, ValueRefused, WireError
from ..wire.frames import USUAL_HEADER, FrameTooLarge
from ..wire.messages import FRAME_OVERHEAD, MAX_CALLS_PER_SUSPENSION, Done, Forget, Message, Resume, Suspend, load_message
from .capture import Capture
from .guest import Death, GuestLost
from .handles import HOST_CALL_ERROR, CallFailed, CallRefused, HandleTable, HostCall, Outcome, run_call
from .host_pool import HostPool
from .watchdog import Watchdog

__all__ = ("Exchange", "TurnEnd", "shown")

#: While guest threads may still have calls to add, the turn goes back to them after this long, then at doubled intervals.
_JOIN_FIRST_SECONDS: Final = 0.001
_JOIN_LAST_SECONDS: Final = 0.02
_NO_CAP: Final = 1 << 40
#: What an element of a decoded value may cost the host, beside its bytes in the frame.
_ELEMENT_BYTES: Final = 100


def shown(text: str, limit: int) -> str:
    """The guest's own words for a person to read: cut, and valid Unicode, so that whoever writes them out does not fail."""
    return text[:limit].encode("utf-8", "backslashreplace").decode()


_UNKNOWN_DEATH: Final = Death()
_NOTHING: Final = load_message(USUAL_HEADER, (Done,))


@dataclass(slots=True)
class TurnEnd:
    """How a turn ended. ``kind``: ``done``; or the guest must be recovered: ``killed``, ``died``, ``violation``.

    ``unprotected``: the recovery point it began with was given up, or the kernel took it.
    """

    kind: Literal["done", "killed", "died", "violation"]
    value: Any = None
    read: dict[str, Any] = field(default_factory=dict)
    failure: tuple[str, str, str] | None = None
    unknown: bool = False
    names: list[str] | None = None
    hit: LimitHit | None = None
    interrupted: bool = False
    host_interrupted: bool = False
    death: Death = _UNKNOWN_DEATH
    detail: str = ""
    unprotected: bool = False
    turn_seconds: float = 0.0
    host_calls: int = 0


class Exchange(abc.ABC):
    """One turn. Made for one request and thrown away; a subclass carries the messages."""

    # Of the class until they change: a turn is made for every call, and most of them change none of these.
    guest_holds_turn = False
    _weight = 0
    _last_call = 0
    _join_at: float | None = None
    _join_interval = _JOIN_FIRST_SECONDS
    _host_interrupted = False
    _interrupt_seen = False
    _host_calls = 0
    _closed = False

    def __init__(
        self,
        handles: HandleTable,
        pool: HostPool,
        limits: Limits,
        capture: Capture,
        is_interrupted: Callable[[], bool],
        session_until: float | None,
        charged: float = 0.0,
    ) -> None:
        """``charged``: seconds of the turn clock that are used up already."""
        self._handles = handles
        self._pool = pool
        self._limits = limits
        self._capture = capture
        self._is_interrupted = is_interrupted
        self._watchdog = Watchdog(limits, time.monotonic(), session_until, _used=charged)
        self._max_frame = _NO_CAP if limits.value_bytes is None else limits.value_bytes + FRAME_OVERHEAD
        self._outstanding: dict[int, HostCall] = {}
        self._weights: dict[int, int] = {}
        self._answers: collections.deque[tuple[int, Outcome]] = collections.deque()

    # ---- what a subclass supplies

    @abc.abstractmethod
    def _deliver(self, message: Message, attachments: list[Attachment]) -> None:
        """Send a message to the guest. Raises `FrameTooLarge` before anything is sent."""

    @abc.abstractmethod
    def _delivered(self) -> bool:
        """Whether the guest has taken all that was sent to it."""

    @abc.abstractmethod
    def _interrupt_guest(self) -> None:
        """Ask the guest to end the cell by itself."""

    @abc.abstractmethod
    def _cpu_seconds(self) -> float | None:
        """CPU time of the guest so far, measured from outside; None if it burns none while the host holds the turn."""

    @abc.abstractmethod
    def _wake_up(self) -> None:
        """Have the turn look at its queues. From any thread."""

    @abc.abstractmethod
    def _step(self) -> TurnEnd | None:
        """Wait for what comes next and take it; how the turn ended, if it did. Raises `WireError` and `GuestLost`."""

    def seen_through(self) -> TurnEnd:
        """Take steps until the turn has ended. Ctrl-C interrupts the cell, and the turn is seen through all the same."""
        end: TurnEnd | None = None
        while end is None:
            try:
                while end is None:  # Ctrl-C is raised where a loop turns back, too, which has to be in here
                    end = self._step()
            except KeyboardInterrupt:
                self._host_interrupted = True
            except WireError as exc:
                end = TurnEnd("violation", detail=str(exc))
            except GuestLost as exc:
                end = TurnEnd("died", detail=str(exc), death=exc.death)
        return end

    # ---- deadlines

    def check_deadlines(self, now: float) -> TurnEnd | None:
        """What time and interrupts demand now; then the answers that are there go out."""
        # With answers at hand the turn goes back at once, and what other guest threads used is added then.
        cpu = None if self.guest_holds_turn or self._answers else self._cpu_seconds()
        verdict = self._watchdog.check(now, cpu)
        if not self._watchdog.ending and (self._host_interrupted or self._is_interrupted()):
            self._interrupt_seen = True
            verdict = self._watchdog.end(now)
        if verdict == "kill":
            return TurnEnd("killed")
        if verdict == "interrupt":
            self._end_softly()
        if not self.guest_holds_turn:
            self._send_answers()
        return None

    def wait_seconds(self, now: float) -> float | None:
        """How long nothing can happen by time alone, None for ever."""
        wait = self._watchdog.wait_seconds(now)
        if self._join_at is not None and not self.guest_holds_turn:
            join = max(0.0, self._join_at - now)
            return join if wait is None else min(wait, join)
        return wait

    def measured(self, end: TurnEnd) -> TurnEnd:
        """``end`` with what the host measured filled in."""
        end.hit = self._watchdog.hit
        end.interrupted = self._interrupt_seen
        end.host_interrupted = self._host_interrupted
        end.turn_seconds = self._watchdog.turn_seconds(time.monotonic(), None)
        end.host_calls = self._host_calls
        return end

    def close(self) -> None:
        """Nobody waits for this turn any more: late answers are refused, and calls that have not begun never do."""
        self._closed = True
        self._pool.drop_queued()

    def _hand_over(self, message: Message, attachments: list[Attachment]) -> None:
        """Send a message that gives the guest the turn."""
        self._deliver(message, attachments)
        self.guest_holds_turn = True
        self._watchdog.guest_turn(time.monotonic(), self._cpu_seconds() if self._watchdog.counts_cpu else None)

    # ---- messages

    def on_message(self, header: Any, attachments: list[Attachment], size: int) -> TurnEnd | None:
        """Take what the guest sent, ``size`` bytes; how the turn ended, if it did.

        Raises:
            WireError: it breaks the turn rules.
        """
        if not self.guest_holds_turn:
            raise WireError("it sent something out of turn")
        message = _NOTHING if header is USUAL_HEADER else load_message(header, (Done, Suspend))
        now = time.monotonic()
        if isinstance(message, Suspend):
            self.guest_holds_turn = False
            self._watchdog.host_turn(now, self._cpu_seconds())
            self._on_suspend(message, attachments, size)
            return None
        assert isinstance(message, Done)
        self._watchdog.host_turn(now, None)
        if attachments:
            self._check_size(attachments)
        value = read = None
        if message.value is not None or message.read is not None:
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
        self._interrupt_guest()
        if not self.guest_holds_turn and self._delivered():
            self._forget()

    def _forget(self) -> None:
        """Give the turn back without answers; what the host functions still return is refused."""
        self._outstanding.clear()
        self._weights.clear()
        self._weight = 0
        self._answers.clear()
        self._pool.drop_queued()
        self._hand_over(Forget("the cell was interrupted"), [])

    # ---- host calls

    def _on_suspend(self, message: Suspend, attachments: list[Attachment], size: int) -> None:
        if len(message.calls) > MAX_CALLS_PER_SUSPENSION:
            raise WireError("too many calls in one suspension")
        if attachments:
            self._check_size(attachments)
        if not message.calls and not self._outstanding and not self._watchdog.ending:
            raise WireError("it waits for answers to no call")
        decoder = Decoder(attachments)
        calls = [self._checked_call(fields, decoder) for fields in message.calls]
        if len(calls) == 1 and not (message.more or attachments or self._outstanding) and self._answered_at_once(*calls[0]):
            return
        # Weighed before any is started: calls that wait hold their arguments, and a guest can add to them for ever.
        weight = size + _ELEMENT_BYTES * decoder.elements
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

    def _answered_at_once(self, number: int, handle: int, method: str | None, args: Any, kwargs: Any) -> bool:
        """The short way of a single inline call that returns something small: no queue, no second look at the deadlines.

        False, with nothing done, if it has to go the long way. What time or an interrupt demands meanwhile, the next step sees.
        """
        allowed = self._limits.host_calls
        if self._watchdog.ending or (allowed is not None and self._host_calls >= allowed):
            return False
        try:
            call = self._handles.resolve(handle, method, args, kwargs)
        except CallRefused:
            return False
        if not call.inline:
            return False
        self._host_calls += 1
        outcome = run_call(call)
        value = None if isinstance(outcome, CallFailed) else outcome.value
        small = value is None or type(value) is bool or (type(value) is int and -MAX_JSON_INT <= value <= MAX_JSON_INT)
        if isinstance(outcome, CallFailed) or not small:
            self._outstanding[number] = call
            self._answers.append((number, outcome))
        else:
            self._join_at = None
            self._hand_over(Resume([[number, value, None]]), [])
        return True

    def _start_call(
        self, number: int, handle: int, method: str | None, args: Any, kwargs: Any, weight: int, too_much: bool
    ) -> None:
        self._host_calls += 1
        allowed = self._limits.host_calls
        if allowed is not None and self._host_calls > allowed and not self._watchdog.ending:
            self._watchdog.end(time.monotonic(), LimitHit("host_calls", allowed, self._host_calls, "host"))
            self._interrupt_guest()
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
            self._wake_up()

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
            self._hand_over(Resume(answers), encoder.attachments)
        except FrameTooLarge:
            failed = [[number, None, [HOST_CALL_ERROR, "the answers are too large to be sent"]] for number, _, _ in answers]
            self._hand_over(Resume(failed), [])
