"""Guest side of host calls: threads that call the host share one channel and one strict turn.

A call joins a queue. Whichever waiting thread finds the channel free becomes the *leader*: it waits a moment for other
threads' calls, sends them all in one suspension, reads the host's answers and hands them out. So
``ThreadPoolExecutor.map(llm_query, ...)`` runs in parallel on the host, and a single call costs one round trip.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..wire.codec import Attachment, Decoder, Encoder, ValueRefused
from ..wire.frames import FrameTooLarge
from ..wire.messages import MAX_CALLS_PER_SUSPENSION, Forget, Message, Resume, Suspend

__all__ = ("CallsHost", "HostCallError", "HostCalls", "Transport", "guest_exception")

#: How long a leader waits for one more thread to join, and at most in all, if there are other threads.
_JOIN_SECONDS: Final = 0.0005
_JOIN_TIMES: Final = 10
#: Trees that are their own value.
_SCALARS: Final = frozenset((str, int, bool))


class HostCallError(Exception):
    """A host function failed. The message names the function and nothing of the host."""

    __module__ = "builtins"  # what a cell sees of it in a traceback


class CallsHost(Protocol):
    """What a proxy calls the host through."""

    def call(self, handle: int, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `HostCalls.call`."""


class Transport(Protocol):
    """What carries frames to the host. `exchange` sends one and blocks for the answer."""

    def send(self, message: Message, attachments: list[Attachment]) -> None: ...

    def exchange(self, message: Message, attachments: list[Attachment]) -> tuple[Any, list[Attachment]]: ...


class _Call:
    __slots__ = ("answer", "done", "error", "number", "request")

    def __init__(self, number: int, request: tuple[int, str | None, tuple[Any, ...], dict[str, Any]]) -> None:
        self.number = number
        self.request = request
        self.done = False
        self.answer: Any = None
        self.error: BaseException | None = None


class HostCalls:
    """The queue of one worker. ``make_value`` turns handles in answers into proxies."""

    def __init__(
        self, transport: Transport, load: Callable[[Any, tuple[type[Message], ...]], Message], make_value: Callable[[Any], Any]
    ) -> None:
        self._transport = transport
        self._load = load
        self._make_value = make_value
        self._changed = threading.Condition()
        self._queue: list[_Call] = []
        self._outstanding: dict[int, _Call] = {}
        self._leading = False
        self._open = False
        self._next = 1
        self._waiting = 0
        self.value_bytes: int | None = None

    def begin_cell(self) -> None:
        """Calls are possible from now on."""
        with self._changed:
            self._open = True

    def end_cell(self) -> None:
        """Wait for the channel, then fail every call still waiting: the turn ends now."""
        with self._changed:
            while self._leading:
                self._changed.wait()
            self._open = False
            for call in (*self._queue, *self._outstanding.values()):
                call.done, call.error = True, HostCallError("the cell has ended")
            self._queue.clear()
            self._outstanding.clear()
            self._changed.notify_all()

    def after_fork(self) -> None:
        """In a new process: no thread but this one exists, and nothing is outstanding."""
        self._changed = threading.Condition()
        self._queue.clear()
        self._outstanding.clear()
        self._leading = self._open = False
        self._waiting = 0

    def call(self, handle: int, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the host and wait for the answer.

        Raises:
            TypeError: an argument is not plain data, or too large.
            HostCallError, or an exception the host allows: the call failed.
        """
        if threading.active_count() == 1:
            with self._changed:
                alone = self._open and not (self._leading or self._queue or self._outstanding)
                if alone:
                    self._leading = True
                    number, self._next = self._next, self._next + 1
            if alone:
                return self._call_alone(number, handle, method, args, kwargs)
        call = self.submit(handle, method, args, kwargs)
        self._waiting += 1
        try:
            self._wait_for(call)
        finally:
            self._waiting -= 1
        if call.error is not None:
            raise call.error
        return call.answer

    def _call_alone(self, number: int, handle: int, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The short way of the usual case: no other thread, so nobody to wait for and one answer to take."""
        try:
            encoder = Encoder(max_bytes=self.value_bytes)
            try:
                call = [number, handle, method, encoder.encode(list(args)), encoder.encode(kwargs)]
            except ValueRefused as exc:
                raise TypeError(f"arguments of a host call must be plain data: {exc}") from None
            try:
                header, attachments = self._transport.exchange(Suspend([call], False), encoder.attachments)
            except FrameTooLarge:
                raise TypeError("arguments of a host call are larger than value_bytes allows") from None
            answer = self._load(header, (Resume, Forget))
            if isinstance(answer, Forget):
                raise KeyboardInterrupt(answer.reason)
            assert isinstance(answer, Resume)
            ((_, value, error),) = answer.answers
            if error is not None:
                raise guest_exception(*error)
            if value is None or type(value) in _SCALARS:
                return value
            return self._make_value(Decoder(attachments, allow_handles=True).decode(value))
        finally:
            with self._changed:
                self._leading = False
                self._changed.notify_all()

    def submit(self, handle: int, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Queue a call without waiting for it. Raises `HostCallError` between cells."""
        with self._changed:
            if not self._open:
                raise HostCallError("host calls are possible only while a cell runs")
            call = _Call(self._next, (handle, method, args, kwargs))
            self._next += 1
            self._queue.append(call)
            self._changed.notify_all()
        return call

    def exchange_queued(self, *, more: bool) -> None:
        """One suspension with what is queued and outstanding, from a guest with one thread. ``more``: it has timers, too."""
        batch, self._queue = self._queue[:MAX_CALLS_PER_SUSPENSION], self._queue[MAX_CALLS_PER_SUSPENSION:]
        self._outstanding.update((item.number, item) for item in batch)
        self._exchange(batch, more=more)

    def _wait_for(self, call: _Call) -> None:
        while True:
            with self._changed:
                while not call.done and self._leading:
                    self._changed.wait()
                if call.done:
                    return
                self._leading = True
                self._let_others_join()
                batch, self._queue = self._queue[:MAX_CALLS_PER_SUSPENSION], self._queue[MAX_CALLS_PER_SUSPENSION:]
                self._outstanding.update((item.number, item) for item in batch)
            try:
                self._exchange(batch)
            finally:
                with self._changed:
                    self._leading = False
                    self._changed.notify_all()

    def _let_others_join(self) -> None:
        if threading.active_count() == 1:
            return
        for _ in range(_JOIN_TIMES):
            before = len(self._queue)
            self._changed.wait(_JOIN_SECONDS)
            if len(self._queue) == before:
                return

    def _exchange(self, batch: list[_Call], *, more: bool = False) -> None:
        """One suspension and the host's resume."""
        encoder = Encoder()
        calls: list[list[Any]] = []
        for index, item in enumerate(batch):
            handle, method, args, kwargs = item.request
            encoder.allow(self.value_bytes)
            kept = len(encoder.attachments)
            try:
                call = [item.number, handle, method, encoder.encode(list(args)), encoder.encode(kwargs)]
            except ValueRefused as exc:
                del encoder.attachments[kept:]
                self._refuse(item, f"arguments of a host call must be plain data: {exc}")
                continue
            if calls and self.value_bytes is not None and sum(map(len, encoder.attachments)) > self.value_bytes:
                # Each is small enough, together they are not: the rest goes with a later suspension.
                del encoder.attachments[kept:]
                self._postpone(batch[index:])
                batch = batch[:index]
                break
            calls.append(call)
        if not calls and not self._outstanding:
            return
        try:
            message = Suspend(calls, more or threading.active_count() > self._waiting)
            header, attachments = self._transport.exchange(message, encoder.attachments)
        except FrameTooLarge:
            for item in batch:
                self._refuse(item, "arguments of host calls made at once are larger than value_bytes allows together")
            return
        answer = self._load(header, (Resume, Forget))
        with self._changed:
            if isinstance(answer, Forget):
                for item in self._outstanding.values():
                    item.done, item.error = True, KeyboardInterrupt(answer.reason)
                self._outstanding.clear()
                return
            assert isinstance(answer, Resume)
            decoder = Decoder(attachments, allow_handles=True)
            for number, value, error in answer.answers:
                item = self._outstanding.pop(number)
                item.done = True
                if error is None:
                    item.answer = self._make_value(decoder.decode(value))
                else:
                    item.error = guest_exception(*error)

    def _postpone(self, items: list[_Call]) -> None:
        with self._changed:
            self._queue[:0] = items
            for item in items:
                self._outstanding.pop(item.number, None)

    def _refuse(self, item: _Call, why: str) -> None:
        with self._changed:
            self._outstanding.pop(item.number, None)
            item.done, item.error = True, TypeError(why)


def guest_exception(type_name: str, message: str) -> BaseException:
    """The guest's exception for a failed call: a built-in one by name if the host allowed it, else `HostCallError`."""
    import builtins

    kind = getattr(builtins, type_name, None) if type_name != "HostCallError" else None
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        return kind(message)
    return HostCallError(message if type_name == "HostCallError" else f"{type_name}: {message}")
