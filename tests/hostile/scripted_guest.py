"""A guest without a process: an implementation of `Guest` over socket pairs, whose worker is a thread that follows a script.

Honest until a cell's source names a move; the move then does with the channel whatever it likes. So `FramedSession` is driven
for real, by bytes that no Python worker would ever send, at moments that no kernel would give twice.
"""

from __future__ import annotations

import collections
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from rlm_sandbox import Context, DataContext, Limits
from rlm_sandbox.bridge.framed import FramedSession
from rlm_sandbox.bridge.guest import Death, Recovery, Report
from rlm_sandbox.registry import SessionConfig, load_backend
from rlm_sandbox.results import Stream
from rlm_sandbox.wire.codec import Attachment
from rlm_sandbox.wire.frames import MAGIC, PROTOCOL_VERSION, FrameReader, dump_frame
from rlm_sandbox.wire.messages import (
    BindObject,
    Configure,
    Done,
    Exec,
    Forget,
    Get,
    Hello,
    Message,
    Names,
    Protect,
    Resume,
    SetValue,
    dump_message,
    load_message,
)

KILLED: Final = Death(status=9, cpu_seconds=0.1, peak_memory_mb=10.0)
_NO_CAP: Final = 1 << 50


class Gone(Exception):
    """The host has closed the channel: the worker is dead."""


def raw_frame(
    head: bytes = b"[]",
    parts: tuple[tuple[int, bytes], ...] = (),
    *,
    magic: int = MAGIC,
    version: int = PROTOCOL_VERSION,
    flags: int = 0,
) -> bytes:
    """A frame by hand: nothing about it is checked."""
    prefix = struct.pack("<HBBII", magic, version, flags, len(head), len(parts))
    table = b"".join(struct.pack("<BQ", kind, len(data)) for kind, data in parts)
    return prefix + table + head + b"".join(data for _, data in parts)


def frame(message: Message | list[Any], attachments: list[Attachment] | None = None) -> bytes:
    """The bytes of a message."""
    header = message if isinstance(message, list) else dump_message(message)
    return b"".join(dump_frame(header, attachments or [], max_bytes=_NO_CAP))


def done(
    value: Any = None,
    read: Any = None,
    failure: list[str] | None = None,
    unknown: bool = False,
    names: list[str] | None = None,
    attachments: list[Attachment] | None = None,
) -> bytes:
    """The bytes of a turn's end."""
    return frame(Done(value, read, failure, unknown, names), attachments)


class Worker:
    """The guest's end of one data channel."""

    def __init__(self, guest: ScriptedGuest, sock: socket.socket, state: dict[str, Any]) -> None:
        self.guest = guest
        self.sock = sock
        self.state = state
        """Variables: name to the tree it was set to."""
        self.seen: list[Message] = []

    def write(self, data: bytes) -> None:
        """Send bytes, whatever they are."""
        try:
            self.sock.sendall(data)
        except OSError:
            raise Gone from None

    def read(self) -> Message:
        """The host's next message."""
        reader = FrameReader(max_bytes=_NO_CAP)
        while True:
            try:
                data = self.sock.recv(reader.wanted)
            except OSError:
                raise Gone from None
            if not data:
                raise Gone
            found = reader.feed(data)
            if found is not None:
                message = load_message(found[0], (Configure, Exec, Get, SetValue, BindObject, Names, Protect, Resume, Forget))
                self.seen.append(message)
                return message

    def call(self, *calls: list[Any], more: bool = False, attachments: list[Attachment] | None = None) -> Message:
        """Suspend for host calls and wait for what comes."""
        self.write(frame(["suspend", list(calls), more], attachments))
        return self.read()

    def print(self, data: bytes, stream: Stream = "stdout") -> None:
        """Write to a captured descriptor."""
        try:
            os.write(self.guest.prints[stream], data)
        except OSError:
            raise Gone from None

    def die(self, death: Death = KILLED) -> None:
        """Be killed by the kernel: the channel closes and the supervisor reports it."""
        self.guest.say(Report("died", death))
        self.close()

    def close(self) -> None:
        """Close the channel."""
        with self.guest.lock:
            self.sock.close()
        raise Gone

    def serve(self) -> None:
        """Be honest, but for the cells that name a move."""
        self.write(frame(Hello(PROTOCOL_VERSION, self.guest.generation)))
        while True:
            message = self.read()
            if isinstance(message, Protect):
                self.guest.protect(self.state)
                continue
            if isinstance(message, Exec) and message.code in self.guest.moves:
                self.guest.moves[message.code](self)
                continue
            if isinstance(message, SetValue):
                self.state[message.name] = message.tree
            if isinstance(message, Get):
                found = message.name in self.state
                self.write(done(self.state.get(message.name), unknown=not found))
            elif isinstance(message, Names):
                self.write(done(["d", *(part for name in self.state for part in (name, "a thing"))]))
            else:
                self.write(done(names=sorted(self.state)))


Move = Callable[[Worker], None]


class ScriptedGuest:
    """See `rlm_sandbox.bridge.guest.Guest`. ``moves``: what to do instead of running a cell, by the cell's source."""

    maps_contexts = False
    stream = None

    def __init__(self, moves: Mapping[str, Move]) -> None:
        self.moves = moves
        self.lock = threading.Lock()
        self.generation = 0
        self.interrupts = 0
        self.closed = False
        self.standby: dict[str, Any] | None = None
        self.reports: collections.deque[Report] = collections.deque()
        self._control, self._control_write = os.pipe()
        self.threads: list[threading.Thread] = []
        self.prints: dict[Stream, int] = {}
        self.outputs: Mapping[int, Stream] = {}
        streams: tuple[Stream, ...] = ("stdout", "stderr")
        for stream in streams:
            read, self.prints[stream] = os.pipe()
            os.set_blocking(read, False)
            self.outputs = {**self.outputs, read: stream}
        self.data = self.start({})

    # ---- the script's side

    def start(self, state: dict[str, Any]) -> socket.socket:
        """Start a worker; returns the host's end of its channel."""
        self.generation += 1
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        worker = Worker(self, theirs, state)
        thread = threading.Thread(target=self._serve, args=(worker,), name="scripted-guest", daemon=True)
        self.threads.append(thread)
        thread.start()
        return mine

    def _serve(self, worker: Worker) -> None:
        try:
            self.serve(worker)
        except Gone:
            pass
        finally:
            with self.lock:
                worker.sock.close()

    def serve(self, worker: Worker) -> None:
        """What a worker does with its life."""
        worker.serve()

    def say(self, report: Report) -> None:
        """Have the supervisor report something."""
        with self.lock:
            if not self.closed:
                self.reports.append(report)
                os.write(self._control_write, b"\0")

    def protect(self, state: dict[str, Any]) -> None:
        """The worker was told to fork its standby."""
        self.standby = dict(state)
        self.say(Report("protected"))

    # ---- the host's side

    @property
    def control_fd(self) -> int:
        return self._control

    def report(self) -> Report | None:
        if not self.reports:
            return None
        os.read(self._control, 1)
        return self.reports.popleft()

    def restart_clock(self, seconds: float | None) -> None: ...

    def wake(self) -> None: ...

    def stop(self) -> None: ...

    def interrupt(self) -> None:
        self.interrupts += 1

    def cpu_seconds(self) -> float | None:
        return None

    def peak_memory_mb(self) -> float | None:
        return None

    def memory_headroom_mb(self) -> float | None:
        return 400.0

    def grow_address_space(self, size: int) -> None: ...

    def open_context(self, context: Context | DataContext) -> int:
        return os.dup(context.memory_file().fd)

    def request_protection(self) -> None: ...

    def recover(self, *, fresh: bool) -> Recovery:
        self.data.close()
        with self.lock:
            while self.reports:
                os.read(self._control, 1)
                self.reports.popleft()
        standby, self.standby = self.standby, None
        restored = standby is not None and not fresh
        self.data = self.start(dict(standby or {}) if restored else {})
        return Recovery("restored" if restored else "fresh", KILLED)

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.data.close()
            for fd in (self._control, self._control_write, *self.outputs, *self.prints.values()):
                os.close(fd)


def open_scripted(
    moves: Mapping[str, Move] | None = None, *, start: Callable[[], ScriptedGuest] | None = None, limits: Limits | None = None
) -> FramedSession:
    """A session on a scripted guest."""
    config = SessionConfig(limits=limits or Limits(time_seconds=5, wall_seconds=5, value_bytes=1 << 20))
    capabilities = load_backend("jail").capabilities(config)
    return FramedSession(start or (lambda: ScriptedGuest(moves or {})), config, capabilities)


@contextmanager
def scripted(
    moves: Mapping[str, Move] | None = None, *, start: Callable[[], ScriptedGuest] | None = None, limits: Limits | None = None
) -> Iterator[FramedSession]:
    """The same, closed at the end."""
    session = open_scripted(moves, start=start, limits=limits)
    try:
        yield session
    finally:
        session.close()
