"""Several channels on one byte stream: how a session's data, control and output share a container's attached stream.

Both ends are a `Framing`: the relay inside the container (`multiplex`) and the session's own thread on the host.

- Frames: kind, channel, tag, length. Only the relay writes the container's stream, and the worker holds neither of its
  ends, so nobody has to find his way back into step after a worker's death.
- Windows: at most `WINDOW` bytes of a channel are on their way unacknowledged, so a peer that does not read one channel
  never holds up another, and neither end buffers without bound.
- Authentic, where ``authenticate`` was called: a worker on gVisor can open the relay's standard streams by /proc. What it
  writes there is no better than what it may send anyway, but everything that is not its own bytes carries a keyed digest.
- Order: what a worker printed before it sent bytes or died is delivered before them.
- The tag of the data channel is the worker's generation, so what a dead worker wrote reaches nobody. The tag of the output
  channels is the turn, so what was printed between turns counts for no later one.
- Together: what is said at once is one piece. Each piece costs the engine two wake-ups on its way.
"""

from __future__ import annotations

import collections
import hashlib
import hmac
import struct
from typing import Final, Protocol

from ..wire import control

__all__ = (
    "ACK", "BYTES", "CHUNK", "DATA", "FILE", "HEADER", "INTERRUPT", "MEASURE", "MESSAGE", "ORDER", "STDERR", "STDOUT", "STOP",
    "VITALS", "WAKE", "WINDOW", "Framing", "Port", "Stream", "StreamFailed",
)  # fmt: skip

HEADER: Final = struct.Struct("<BBHI")
BYTES: Final = 0
ACK: Final = 1
MESSAGE: Final = 2
#: The name of a file whose descriptor goes with the data that follows.
FILE: Final = 3
#: The worker's CPU time so far in seconds, what it may still allocate in KiB (below 0: not known), and whether it is stopped.
VITALS: Final = 4
#: What the host orders in each turn, and so not as JSON: which, and the turn.
ORDER: Final = 5
_VITALS: Final = struct.Struct("<dq?")
_ORDER: Final = struct.Struct("<BH")

WAKE: Final = 1
STOP: Final = 2
INTERRUPT: Final = 3
#: Send the worker's vitals.
MEASURE: Final = 4

DATA: Final = 0
STDOUT: Final = 1
STDERR: Final = 2

WINDOW: Final = 1 << 19
CHUNK: Final = 1 << 16
_ACK_AT: Final = WINDOW // 4
#: Kinds that are handled whole, with the length they may have.
_WHOLE: Final = {MESSAGE: control.MAX_MESSAGE, FILE: 64, VITALS: _VITALS.size, ORDER: _ORDER.size}
_DIGEST: Final = 16
#: Frames are joined up to this size; a pipe takes so much at once.
_TOGETHER: Final = 1 << 16


class StreamFailed(Exception):
    """The stream ended or the peer broke the framing."""


class Stream(Protocol):
    """A non-blocking byte stream in both directions."""

    read_fd: int
    write_fd: int

    def read(self) -> bytes:
        """What is there. Raises BlockingIOError if nothing is, StreamFailed or OSError at the end."""

    def write(self, data: bytes | memoryview) -> int:
        """Write some of it. Raises BlockingIOError if nothing fits."""


class Port:
    """One channel: what this end may still send, and what it has received and not passed on."""

    __slots__ = ("channel", "closed", "credit", "fd", "pending", "unacked", "waiting")

    def __init__(self, channel: int, fd: int) -> None:
        self.channel = channel
        self.fd = fd
        self.pending: collections.deque[tuple[memoryview, tuple[int, ...]]] = collections.deque()
        self.credit = WINDOW
        self.waiting = 0
        self.unacked = 0
        self.closed = False


class Framing:
    """One end of the stream. Subclasses say where bytes come from and go to, and what messages mean.

    ``inside``: this is the container's end.
    """

    def __init__(self, stream: Stream, ports: dict[int, Port], *, inside: bool) -> None:
        self._stream = stream
        self._inside = inside
        self._ports = ports
        self._port = ports[DATA]
        self._outputs = tuple(port for port in ports.values() if port.channel != DATA)
        self._generation = 1
        self._turn = 0
        self._outbox: collections.deque[bytes | memoryview] = collections.deque()
        self._header = b""
        self._left = 0
        self._kind = self._channel = self._tag = 0
        self._assembled = bytearray()
        self._files: tuple[int, ...] = ()
        self._key = b""
        self._signed = self._verified = 0

    # ---- what subclasses add

    def on_bytes(self, port: Port, payload: bytes) -> None:
        """Bytes of a channel of this generation and turn; empty: the data channel ends."""
        raise NotImplementedError

    def on_remote(self, message: control.Message) -> None:
        """A message of the other end."""
        raise NotImplementedError

    def on_order(self, order: int, turn: int) -> None:
        """An order of the host."""
        raise StreamFailed("an order came from the wrong end")

    def on_vitals(self, cpu_seconds: float, headroom_kb: int, stopped: bool) -> None:
        """How the worker is, as of the bytes that follow, or of now."""
        raise StreamFailed("a measurement came from the wrong end")

    def on_file(self, name: str) -> int:
        """Open a file that goes with the data that follows."""
        raise StreamFailed("a file was not expected")

    # ---- to the stream

    def authenticate(self, key: bytes) -> None:
        """From now on, in both directions: what is not bytes or acknowledgements carries a digest with this key."""
        self._key = key

    def _digest(self, direction: bool, number: int, kind: int, payload: bytes) -> bytes:
        head = struct.pack("<?QB", direction, number, kind)
        return hashlib.blake2s(head + payload, digest_size=_DIGEST, key=self._key).digest()

    def _send(self, kind: int, channel: int, tag: int, payload: bytes, length: int | None = None) -> None:
        """Queue a frame; `_flush_stream` sends what is queued."""
        if self._key and kind in _WHOLE:
            payload = self._digest(self._inside, self._signed, kind, payload) + payload
            self._signed += 1
        self._outbox.append(HEADER.pack(kind, channel, tag, len(payload) if length is None else length) + payload)

    def _flush_stream(self) -> None:
        while self._outbox:
            if len(self._outbox) > 1 and len(self._outbox[0]) + len(self._outbox[1]) <= _TOGETHER:
                self._join_first()
            first = self._outbox[0]
            try:
                sent = self._stream.write(first)
            except BlockingIOError:
                return
            if sent == len(first):
                self._outbox.popleft()
            else:
                self._outbox[0] = memoryview(first)[sent:]

    def _join_first(self) -> None:
        """Make one piece of the first few."""
        first: list[bytes | memoryview] = []
        size = 0
        while self._outbox and size + len(self._outbox[0]) <= _TOGETHER:
            size += len(self._outbox[0])
            first.append(self._outbox.popleft())
        self._outbox.appendleft(b"".join(first))

    def send_message(self, message: control.Message) -> None:
        """Send a message to the other end."""
        self._send(MESSAGE, 0, 0, control.dump(message))

    def send_order(self, order: int, turn: int = 0) -> None:
        """Send an order to the container's end."""
        self._send(ORDER, 0, 0, _ORDER.pack(order, turn))

    def _send_measured(self, cpu_seconds: float, headroom_kb: int, stopped: bool) -> None:
        self._send(VITALS, 0, 0, _VITALS.pack(cpu_seconds, headroom_kb, stopped))

    def _acknowledge(self, port: Port, size: int) -> None:
        port.unacked += size
        if port.unacked >= _ACK_AT:
            tag = self._generation if port is self._port else 0
            self._send(ACK, port.channel, tag, b"", port.unacked)
            port.unacked = 0

    # ---- from the stream

    def _take_stream(self) -> None:
        """Take what has come. Raises StreamFailed or OSError at the end."""
        try:
            data = memoryview(self._stream.read())
        except BlockingIOError:
            return
        while data:
            if not self._left:
                if not self._header and len(data) >= HEADER.size:
                    self._kind, self._channel, self._tag, self._left = HEADER.unpack_from(data)
                    data = data[HEADER.size :]
                else:
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
            elif not (self._left or self._assembled):
                self._whole(bytes(part))
            else:
                self._assembled += part
                if not self._left:
                    whole = bytes(self._assembled)
                    self._assembled.clear()
                    self._whole(whole)

    def _begin(self) -> None:
        kind, length = self._kind, self._left
        if kind == ACK:
            self._left = 0
            port = self._ports.get(self._channel)
            if port is not None and (self._channel != DATA or self._tag == self._generation):
                port.credit += length
        elif kind == BYTES:
            if self._channel not in self._ports or length > CHUNK:
                raise StreamFailed("a channel is unknown, or its frame too long")
            if not length:
                self._deliver(b"")
        elif kind not in _WHOLE or not 0 < length <= _WHOLE[kind] + _DIGEST:
            raise StreamFailed("a frame is malformed")

    def _deliver(self, payload: bytes) -> None:
        port = self._ports[self._channel]
        if port is self._port:
            if self._tag == self._generation:
                self.on_bytes(port, payload)
        elif self._inside:
            raise StreamFailed("output came from the wrong end")
        elif self._tag != self._turn:
            self._acknowledge(port, len(payload))
        else:
            self.on_bytes(port, payload)

    def _whole(self, payload: bytes) -> None:
        kind = self._kind
        if self._key:
            digest, payload = payload[:_DIGEST], payload[_DIGEST:]
            if not hmac.compare_digest(digest, self._digest(not self._inside, self._verified, kind, payload)):
                raise StreamFailed("a message is forged")
            self._verified += 1
        if kind == MESSAGE:
            try:
                message = control.load(payload)
            except ValueError as exc:
                raise StreamFailed(str(exc)) from None
            self.on_remote(message)
        elif kind in (VITALS, ORDER):
            fields = _VITALS if kind == VITALS else _ORDER
            if len(payload) != fields.size:
                raise StreamFailed("a frame is malformed")
            if kind == VITALS:
                self.on_vitals(*_VITALS.unpack(payload))
            else:
                self.on_order(*_ORDER.unpack(payload))
        elif self._tag == self._generation:
            self._files = (self.on_file(payload.decode("ascii", "replace")),)
