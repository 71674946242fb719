"""Several channels on one byte stream: how a session's data, control and output share a container's attached stream.

Both ends run the same `Multiplexer`: the relay inside the container and a thread of the host. Each has the local
descriptors that a session without a container would have (a data socket, a control socket, two output pipes), and the
stream between the two.

- Frames: kind, channel, tag, length. Only supervisor and relay write the container's stream, and the worker holds
  neither of its ends, so nobody has to find his way back into step after a worker's death.
- Windows: at most `WINDOW` bytes of a channel are on their way unacknowledged, so a peer that does not read one channel
  never holds up another, and neither end buffers without bound.
- Authentic, where ``authenticate`` was called: a worker on gVisor can open the relay's standard streams by /proc. What it
  writes there is no better than what it may send anyway, but messages, measurements and file names carry a keyed digest.
- Order: what a worker printed before it sent bytes or died is delivered before them.
- The tag of the data channel is the worker's generation, so what a dead worker wrote reaches nobody. The tag of the output
  channels is the turn, so what was printed between turns counts for no later one.
"""

from __future__ import annotations

import collections
import hashlib
import hmac
import os
import select
import socket
import struct
from typing import Final, Protocol

from . import control

__all__ = ("DATA", "HEADER", "MESSAGE", "STDERR", "STDOUT", "WINDOW", "Multiplexer", "Stream", "StreamFailed")

HEADER: Final = struct.Struct("<BBHI")
BYTES: Final = 0
ACK: Final = 1
MESSAGE: Final = 2
#: The name of a file whose descriptor goes with the data that follows.
FILE: Final = 3
#: The worker's CPU time so far in seconds, and what it may still allocate in KiB (below 0: not known).
VITALS: Final = 4
_VITALS: Final = struct.Struct("<dq")

DATA: Final = 0
STDOUT: Final = 1
STDERR: Final = 2

WINDOW: Final = 1 << 19
_CHUNK: Final = 1 << 16
_ACK_AT: Final = WINDOW // 4
#: Kinds that are handled whole, with the length they may have.
_WHOLE: Final = {MESSAGE: control.MAX_MESSAGE, FILE: 64, VITALS: _VITALS.size}
_DIGEST: Final = 16
#: Frames are joined up to this size; a pipe takes so much at once.
_TOGETHER: Final = 1 << 16
#: Reads of one pipe before something that was sent after it goes on; a pipe holds 64 KiB.
_DRAIN_READS: Final = 4


class StreamFailed(Exception):
    """The stream ended or the peer broke the framing."""


class Stream(Protocol):
    """A non-blocking byte stream in both directions."""

    read_fd: int
    write_fd: int

    def read(self) -> bytes:
        """What is there. Raises BlockingIOError if nothing is, StreamFailed or OSError at the end."""

    def write(self, data: memoryview) -> int:
        """Write some of it. Raises BlockingIOError if nothing fits."""


class _Port:
    """The local end of one channel."""

    __slots__ = ("channel", "closed", "credit", "fd", "pending", "unacked")

    def __init__(self, channel: int, fd: int) -> None:
        self.channel = channel
        self.fd = fd
        self.pending: collections.deque[tuple[memoryview, tuple[int, ...]]] = collections.deque()
        self.credit = WINDOW
        self.unacked = 0
        self.closed = False


class Multiplexer:
    """Moves bytes between a stream and local descriptors until either side ends. Subclasses say what messages mean.

    ``reads_outputs``: this end reads the output pipes (the relay) rather than writes them (the host).
    """

    def __init__(
        self, stream: Stream, data: socket.socket, local: socket.socket, outputs: dict[int, int], *, reads_outputs: bool
    ) -> None:
        self._stream = stream
        self._data = data
        self._local = local
        self._reads_outputs = reads_outputs
        self._ports = {channel: _Port(channel, fd) for channel, fd in outputs.items()}
        self._outputs = tuple(self._ports.values())
        self._port = self._ports[DATA] = _Port(DATA, data.fileno())
        self._generation = 1
        self._turn = 0
        self._outbox: collections.deque[memoryview] = collections.deque()
        self._header = b""
        self._left = 0
        self._kind = self._channel = self._tag = 0
        self._assembled = bytearray()
        self._files: tuple[int, ...] = ()
        self._key = b""
        self._signed = self._verified = 0
        self._poll = select.poll()
        self._masks: dict[int, int] = {}
        data.setblocking(False)
        local.setblocking(False)
        for fd in outputs.values():
            os.set_blocking(fd, False)

    # ---- what subclasses add

    def on_remote(self, message: control.Message) -> None:
        """A message of the other end."""
        raise NotImplementedError

    def on_local(self, message: control.Message, fds: list[int]) -> None:
        """A message on the local control socket; the descriptors are the receiver's."""
        raise NotImplementedError

    def vitals(self) -> tuple[float, int] | None:
        """The worker's CPU time in seconds and what it may still allocate in KiB, where this end can tell."""
        return None

    def on_vitals(self, cpu_seconds: float, headroom_kb: int) -> None:
        """The same from the other end, as of the bytes that follow, or of now."""

    def on_file(self, name: str) -> int:
        """Open a file that goes with the data that follows."""
        raise StreamFailed("a file was not expected")

    def on_descriptor(self, fd: int) -> str:
        """Name the file behind a descriptor that goes with the data that follows, and close it."""
        os.close(fd)
        raise StreamFailed("a descriptor was not expected")

    # ---- the loop

    def run(self) -> None:
        """Until the local control socket or the stream ends. Raises StreamFailed or OSError for the latter."""
        self._serve_channels()
        self._flush_stream()  # last words

    def _serve_channels(self) -> None:
        stream, data, local = self._stream, self._port, self._local.fileno()
        while True:
            if self._outbox:
                self._flush_stream()
            # Too much output is unread: hold the data back as well, it could not be delivered before it anyway.
            flooded = self._reads_outputs and any(port.credit < -WINDOW for port in self._outputs)
            reads = select.POLLIN if data.credit > 0 and not flooded and not data.closed else 0
            self._want(data.fd, reads | (select.POLLOUT if data.pending and not self._held() else 0))
            for port in self._outputs:
                if self._reads_outputs:
                    self._want(port.fd, select.POLLIN if port.credit > 0 and not port.closed else 0)
                else:
                    self._want(port.fd, select.POLLOUT if port.pending else 0)
            self._want(local, select.POLLIN)
            if stream.read_fd == stream.write_fd:
                self._want(stream.read_fd, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            else:
                self._want(stream.read_fd, select.POLLIN)
                self._want(stream.write_fd, select.POLLOUT if self._outbox else 0)
            ready = dict(self._poll.poll())
            if local in ready and not self._take_local():
                return
            if ready.get(stream.read_fd, 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._take_stream()
            for port in self._outputs:
                if port.fd in ready:
                    if self._reads_outputs:
                        self._take_output(port)
                    else:
                        self._flush_port(port)
            event = ready.get(self._port.fd, 0)
            if event & select.POLLOUT:
                self._flush_port(self._port)
            if event & (select.POLLIN | select.POLLHUP) and reads and data is self._port and not self._take_data():
                return
            data = self._port

    def _want(self, fd: int, mask: int) -> None:
        if self._masks.get(fd, 0) == mask:
            return
        self._masks[fd] = mask
        if mask:
            self._poll.register(fd, mask)
        else:
            self._poll.unregister(fd)

    def _forget_fd(self, fd: int) -> None:
        if self._masks.pop(fd, 0):
            self._poll.unregister(fd)

    def authenticate(self, key: bytes) -> None:
        """From now on, in both directions: what is not bytes or acknowledgements carries a digest with this key."""
        self._key = key

    def _digest(self, direction: bool, number: int, kind: int, payload: bytes) -> bytes:
        head = struct.pack("<?QB", direction, number, kind)
        return hashlib.blake2s(head + payload, digest_size=_DIGEST, key=self._key).digest()

    # ---- to the stream

    def _send(self, kind: int, channel: int, tag: int, payload: bytes, length: int | None = None) -> None:
        if self._key and kind in _WHOLE:
            payload = self._digest(self._reads_outputs, self._signed, kind, payload) + payload
            self._signed += 1
        # Sent when the loop comes round: what is said together travels together, and each piece costs the engine two wake-ups.
        self._outbox.append(memoryview(HEADER.pack(kind, channel, tag, len(payload) if length is None else length) + payload))

    def _flush_stream(self) -> None:
        while self._outbox:
            if len(self._outbox) > 1 and len(self._outbox[0]) + len(self._outbox[1]) <= _TOGETHER:
                self._join_first()
            try:
                sent = self._stream.write(self._outbox[0])
            except BlockingIOError:
                return
            if sent == len(self._outbox[0]):
                self._outbox.popleft()
            else:
                self._outbox[0] = self._outbox[0][sent:]

    def _join_first(self) -> None:
        """Make one piece of the first few."""
        first: list[memoryview] = []
        size = 0
        while self._outbox and size + len(self._outbox[0]) <= _TOGETHER:
            size += len(self._outbox[0])
            first.append(self._outbox.popleft())
        self._outbox.appendleft(memoryview(b"".join(first)))

    def send_message(self, message: control.Message) -> None:
        """Send a message to the other end."""
        self._send(MESSAGE, 0, 0, control.dump(message))

    def send_vitals(self) -> None:
        """Tell the other end how the worker is, if this end knows."""
        found = self.vitals()
        if found is not None:
            self._send(VITALS, 0, 0, _VITALS.pack(*found))

    def set_turn(self, number: int) -> None:
        """From now on output belongs to another turn. The end that reads the pipes first takes what is of the old one."""
        if self._reads_outputs:
            self._drain_outputs()
        self._turn = number & 0xFFFF

    def set_generation(self, data: socket.socket, number: int) -> None:
        """Go on with another data socket: what is of the old one is dropped."""
        self._forget_fd(self._port.fd)
        for _, fds in self._port.pending:
            for fd in fds:
                os.close(fd)
        self._data.close()
        data.setblocking(False)
        self._data = data
        self._port = self._ports[DATA] = _Port(DATA, data.fileno())
        self._generation = number & 0xFFFF
        if not self._reads_outputs:
            for port in self._outputs:
                self._acknowledge(port, sum(len(part) for part, _ in port.pending))
                port.pending.clear()

    def _take_local(self) -> bool:
        """Messages on the local control socket. False at its end."""
        while True:
            try:
                got = control.receive(self._local)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if got is None:
                return False
            if self._reads_outputs:
                self._drain_outputs()
            self.on_local(*got)

    def _take_data(self) -> bool:
        """Bytes on the data socket. False if the session is over."""
        if not self._reads_outputs and not self._take_local():
            return False  # an order that was sent before these bytes goes first
        port = self._port
        if not self._reads_outputs:
            try:
                payload, ancillary, _, _ = self._data.recvmsg(min(_CHUNK, port.credit), socket.CMSG_SPACE(4))
            except BlockingIOError:
                return True
            except OSError:
                payload, ancillary = b"", []
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._send(FILE, DATA, self._generation, self.on_descriptor(struct.unpack("=i", raw[:4])[0]).encode())
        else:
            try:
                payload = self._data.recv(min(_CHUNK, port.credit))
            except BlockingIOError:
                return True
            except OSError:
                payload = b""
            self._drain_outputs()
            self.send_vitals()
        port.credit -= len(payload)
        port.closed = not payload
        self._send(BYTES, DATA, self._generation, payload)
        return True

    def _take_output(self, port: _Port) -> bool:
        try:
            payload = os.read(port.fd, _CHUNK)
        except BlockingIOError:
            return False
        port.closed = not payload
        if payload:
            port.credit -= len(payload)
            self._send(BYTES, port.channel, self._turn, payload)
        return bool(payload)

    def _drain_outputs(self) -> None:
        for port in self._outputs:
            for _ in range(_DRAIN_READS):
                if not self._take_output(port):
                    break

    # ---- from the stream

    def _take_stream(self) -> None:
        try:
            data = memoryview(self._stream.read())
        except BlockingIOError:
            return
        while data:
            if not self._left:
                take = HEADER.size - len(self._header)
                self._header += data[:take]
                data = data[take:]
                if len(self._header) < HEADER.size:
                    return
                self._kind, self._channel, self._tag, self._left = HEADER.unpack(self._header)
                self._header = b""
                self._begin()
                continue
            part, data = data[: self._left], data[self._left :]
            self._left -= len(part)
            if self._kind == BYTES:
                self._deliver(bytes(part))
            else:
                self._assembled += part
                if not self._left:
                    self._whole(bytes(self._assembled))
                    self._assembled.clear()

    def _begin(self) -> None:
        kind, length = self._kind, self._left
        if kind == ACK:
            self._left = 0
            port = self._ports.get(self._channel)
            if port is not None and (self._channel != DATA or self._tag == self._generation):
                port.credit += length
        elif kind == BYTES:
            if self._channel not in self._ports or length > _CHUNK:
                raise StreamFailed("a channel is unknown, or its frame too long")
            if not length:
                self._deliver(b"")
        elif kind not in _WHOLE or not 0 < length <= _WHOLE[kind] + _DIGEST:
            raise StreamFailed("a frame is malformed")

    def _whole(self, payload: bytes) -> None:
        if self._key:
            digest, payload = payload[:_DIGEST], payload[_DIGEST:]
            if not hmac.compare_digest(digest, self._digest(not self._reads_outputs, self._verified, self._kind, payload)):
                raise StreamFailed("a message is forged")
            self._verified += 1
        if self._kind == MESSAGE:
            try:
                message = control.load(payload)
            except ValueError as exc:
                raise StreamFailed(str(exc)) from None
            self.on_remote(message)
        elif self._kind == VITALS:
            if len(payload) != _VITALS.size:
                raise StreamFailed("a frame is malformed")
            self.on_vitals(*_VITALS.unpack(payload))
        elif self._tag == self._generation:
            self._files = (self.on_file(payload.decode("ascii", "replace")),)

    def _held(self) -> bool:
        """Whether output that came before must be delivered first."""
        return not self._reads_outputs and any(port.pending for port in self._outputs)

    def _deliver(self, payload: bytes) -> None:
        port = self._ports[self._channel]
        if port is self._port:
            if self._tag != self._generation:
                return
        elif self._reads_outputs:
            raise StreamFailed("output came from the wrong end")
        elif self._tag != self._turn:
            self._acknowledge(port, len(payload))
            return
        files, self._files = (self._files, ()) if port is self._port else ((), self._files)
        port.pending.append((memoryview(payload), files))
        if len(port.pending) == 1 and not (port is self._port and self._held()):
            self._flush_port(port)

    def _flush_port(self, port: _Port) -> None:
        while port.pending:
            payload, files = port.pending[0]
            try:
                if port is not self._port:
                    sent = os.write(port.fd, payload)
                elif not payload:
                    self._data.shutdown(socket.SHUT_WR)
                    sent = 0
                elif files:
                    rights = struct.pack(f"={len(files)}i", *files)
                    sent = self._data.sendmsg([payload], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                else:
                    sent = self._data.send(payload)
            except BlockingIOError:
                return
            except OSError:
                sent = len(payload)  # the reader is gone; somebody else says how
            for fd in files:
                os.close(fd)
            self._acknowledge(port, sent)
            if sent == len(payload):
                port.pending.popleft()
            else:
                port.pending[0] = (payload[sent:], ())
        if port is not self._port and self._port.pending and not self._held():
            self._flush_port(self._port)

    def _acknowledge(self, port: _Port, size: int) -> None:
        port.unacked += size
        if port.unacked >= _ACK_AT:
            tag = self._generation if port is self._port else 0
            self._send(ACK, port.channel, tag, b"", port.unacked)
            port.unacked = 0
