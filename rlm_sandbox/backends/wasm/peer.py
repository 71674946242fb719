"""`Peer`: what an instance's imports reach while it runs one request: the live host, or the journal at a replay."""

from __future__ import annotations

import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from ...context import Context
from ...wire.strings import pack_text
from .journal import Entry

__all__ = ("LivePeer", "Peer", "ReplayPeer", "Stopped")

_PIECE_CHARS: Final = 1 << 20
#: What a guest may have printed that nobody has read yet, in characters; then it waits.
_MAX_UNREAD: Final = 4 << 20


class Stopped(Exception):
    """The guest must end here."""


class Peer(Protocol):
    """The other side of one request. Called on the guest's thread; `Stopped` ends the guest."""

    must_stop: bool
    exited: bool

    def suspend(self, frame: str) -> str: ...

    def write_out(self, descriptor: int, raw: bool, text: str) -> None: ...

    def text_piece(self, start: int) -> str: ...

    def number(self, read: Callable[[], int]) -> int: ...

    def random_bytes(self, count: int) -> bytes: ...

    def sleep_until(self, now: Callable[[], int], when: int) -> int: ...


def _piece(context: Context | None, start: int) -> str:
    return "" if context is None else pack_text(context[start : start + _PIECE_CHARS])


class LivePeer:
    """The host, for a request that runs for the first time. Records in ``entry`` whatever the guest was told."""

    def __init__(self, entry: Entry) -> None:
        self.must_stop = False
        self.exited = False
        self.entry = entry
        #: What happened, for the turn's thread: it takes a signal, then looks here.
        self.signals: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.output: deque[tuple[int, bytes]] = deque()
        self.suspended: str | None = None
        self.ended: str | None = None
        self.failed: str | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._unread = 0
        self._changed = threading.Condition()

    # ---- on the turn's thread

    def answer(self, frame: str) -> None:
        """Let a suspended guest go on."""
        self._answers.put(frame)

    def stop(self) -> None:
        """End the guest wherever it is: at the next tick, in a suspension, asleep, or waiting to print."""
        self.must_stop = True
        self._answers.put(None)
        with self._changed:
            self._changed.notify()

    def take_output(self) -> list[tuple[int, bytes]]:
        """What was printed since the last call."""
        taken: list[tuple[int, bytes]] = []
        while self.output:
            taken.append(self.output.popleft())
        if taken:
            with self._changed:
                self._unread -= sum(len(data) for _, data in taken)
                self._changed.notify()
        return taken

    # ---- on the guest's thread

    def end(self, frame: str | None, why: str | None) -> None:
        """The request returned, or the guest trapped."""
        self.ended, self.failed = frame, why
        self.signals.put(None)

    def suspend(self, frame: str) -> str:
        self._check()
        self.entry.note_suspension(frame)
        self.suspended = frame
        self.signals.put(None)
        answer = self._answers.get()
        if answer is None:
            raise Stopped
        self.entry.note(answer)
        return answer

    def write_out(self, descriptor: int, raw: bool, text: str) -> None:
        self._check()
        data = text.encode("latin-1", "replace") if raw else text.encode("utf-8")
        with self._changed:
            self._unread += len(data)
        self.output.append((descriptor, data))
        self.signals.put(None)
        if self._unread > _MAX_UNREAD:
            with self._changed:
                while self._unread > _MAX_UNREAD and not self.must_stop:
                    self._changed.wait()
            self._check()

    def text_piece(self, start: int) -> str:
        self._check()
        return _piece(self.entry.context, start)

    def number(self, read: Callable[[], int]) -> int:
        self._check()
        value = read()
        self.entry.note(value)
        return value

    def random_bytes(self, count: int) -> bytes:
        self._check()
        data = secrets.token_bytes(count)
        self.entry.note(data)
        return data

    def sleep_until(self, now: Callable[[], int], when: int) -> int:
        """Sleep to a time of the guest's clock; the time then."""
        self._check()
        began = value = now()
        while value < when:
            with self._changed:
                if self.must_stop:
                    raise Stopped
                self._changed.wait(min((when - value) / 1e9, threading.TIMEOUT_MAX))
            value = now()
        self.entry.slept += (value - began) / 1e9
        self.entry.note(value)
        return value

    def _check(self) -> None:
        if self.must_stop:
            raise Stopped


class ReplayPeer:
    """The journal, for a request that ran before: the same answers in the same order, nothing asked twice, no output."""

    def __init__(self, entry: Entry) -> None:
        self.must_stop = False
        self.exited = False
        self.diverged = False
        self._entry = entry
        self._answers = iter(entry.answers)
        self._suspensions = iter(entry.suspensions)
        self.ended: str | None = None

    @property
    def matched(self) -> bool:
        """Whether the request ended as it did the first time, having been told all it was told then."""
        return (
            not self.diverged
            and self.ended is not None
            and hash(self.ended) == self._entry.ended
            and next(self._answers, None) is None
            and next(self._suspensions, None) is None
        )

    def end(self, frame: str | None, why: str | None) -> None:
        self.ended = frame

    def _next(self, kind: type) -> Any:
        if self.must_stop:
            raise Stopped
        value = next(self._answers, None)
        if type(value) is not kind:
            self.diverged = True
            raise Stopped
        return value

    def suspend(self, frame: str) -> str:
        if next(self._suspensions, None) != hash(frame):
            self.diverged = True
            raise Stopped
        answer: str = self._next(str)
        return answer

    def write_out(self, descriptor: int, raw: bool, text: str) -> None:
        if self.must_stop:
            raise Stopped

    def text_piece(self, start: int) -> str:
        if self.must_stop:
            raise Stopped
        return _piece(self._entry.context, start)

    def number(self, read: Callable[[], int]) -> int:
        value: int = self._next(int)
        return value

    def random_bytes(self, count: int) -> bytes:
        data: bytes = self._next(bytes)
        if len(data) != count:
            self.diverged = True
            raise Stopped
        return data

    def sleep_until(self, now: Callable[[], int], when: int) -> int:
        value: int = self._next(int)
        return value
