"""Frames on a byte stream: a JSON header and raw attachments, every length checked before anything is allocated.

Layout, little-endian: magic ``u16``, protocol version ``u8``, flags ``u8`` (0), header length ``u32``, attachment
count ``u32``; then per attachment a kind ``u8`` (0 bytes, 1 text as UTF-8 with surrogatepass) and a length ``u64``;
then the header, then the attachments.

`FrameReader` is a parser without input: it says how many bytes it wants next, and its owner reads them. So the same
parser serves a blocking guest, a polling host and a fuzzer, and a peer that sends one byte a second blocks nobody.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

from .codec import MAX_ATTACHMENTS, Attachment, WireError

#: Raised by one when an older peer could misread a newer one.
PROTOCOL_VERSION: Final = 1
MAGIC: Final = 0x4C52
#: A JSON header's largest size; the cap of the frame binds first where it is lower. What parsing can allocate beyond the
#: header's own size is bounded by the elements.
MAX_HEADER_BYTES: Final = 128 * 1024 * 1024
#: Brackets, commas and colons in a header: an upper bound of the objects that parsing it makes, checked before.
MAX_HEADER_TOKENS: Final = 2_100_000

_PREFIX: Final = struct.Struct("<HBBII")
_ENTRY: Final = struct.Struct("<BQ")
_KINDS: Final = {0: "bytes", 1: "str"}


class FrameTooLarge(WireError):
    """A frame announces more than the cap. Nothing was allocated."""


class FrameTruncated(WireError):
    """The stream ended inside a frame."""


def dump_header(header: Any) -> bytes:
    """A header as JSON.

    Raises:
        FrameTooLarge: it is larger, or has more elements, than the protocol allows.
        WireError: it has lone surrogates outside an attachment.
    """
    try:
        head = _encode(header).encode("utf-8")
    except ValueError:  # lone surrogates, floats that are not finite
        raise WireError("a header has a text or a number that JSON cannot carry") from None
    if len(head) > MAX_HEADER_BYTES:
        raise FrameTooLarge("the frame's header is larger than the protocol allows")
    if len(head) > MAX_HEADER_TOKENS and _tokens(head) > MAX_HEADER_TOKENS:
        raise FrameTooLarge("the frame's header has more elements than the protocol allows")
    return head


def load_header(head: bytes) -> Any:
    """The header of its JSON.

    Raises:
        FrameTooLarge: it has more elements than the protocol allows; nothing was made of it.
        WireError: it is not JSON.
    """
    if len(head) > MAX_HEADER_TOKENS and _tokens(head) > MAX_HEADER_TOKENS:
        raise FrameTooLarge("a frame's header has more elements than the protocol allows")
    try:
        text = head.decode("utf-8")
        header, end = _decoder().scan_once(text, 0)  # type: ignore[attr-defined]
    except (ValueError, RecursionError, StopIteration):
        raise WireError("a frame's header is not valid JSON") from None
    if end != len(text):
        raise WireError("a frame's header is not valid JSON")
    return header


def dump_frame(header: Any, attachments: list[Attachment], *, max_bytes: int) -> list[bytes]:
    """The frame as a list of buffers to write in order.

    Raises:
        FrameTooLarge: it is larger than ``max_bytes``; nothing was written, the stream stays in step.
        WireError: the header has lone surrogates outside an attachment, or a float that is not finite.
    """
    if not attachments and header == USUAL_HEADER:
        return [_USUAL_FRAME]
    head = dump_header(header)
    if not attachments and len(head) <= max_bytes:
        return [_PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, len(head), 0) + head]
    raw = [part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass") for part in attachments]
    if len(raw) > MAX_ATTACHMENTS:
        raise FrameTooLarge("the frame has more attachments than the protocol allows")
    if len(head) + sum(map(len, raw)) > max_bytes:
        raise FrameTooLarge(f"the frame is larger than {max_bytes} bytes")
    table = b"".join(_ENTRY.pack(isinstance(part, str), len(data)) for part, data in zip(attachments, raw, strict=True))
    return [_PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, len(head), len(raw)) + table + head, *raw]


def ends_turn(data: bytes) -> bool:
    """Whether ``data`` is exactly one frame that says ``done`` and has no attachments, by its looks: whoever sent it may lie."""
    return data[_PREFIX.size : _PREFIX.size + len(_DONE)] == _DONE and data[: _PREFIX.size] == _PREFIX.pack(
        MAGIC, PROTOCOL_VERSION, 0, len(data) - _PREFIX.size, 0
    )


class FrameReader:
    """Parses frames from bytes fed to it. One instance per stream; after an error the stream is dead."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._stage = 0
        self._dead = False
        self._buffer = bytearray()
        self._want = _PREFIX.size
        self._head_length = 0
        self._entries_wanted = 0
        self._entries: list[tuple[int, int]] = []
        self._parts: list[bytes] = []

    @property
    def wanted(self) -> int:
        """How many more bytes the present stage needs; always above 0. Feed at most this many."""
        return self._want - len(self._buffer)

    @property
    def mid_frame(self) -> bool:
        """True if a frame has begun and not ended."""
        return self._stage > 0 or bool(self._buffer)

    @property
    def frame_bytes(self) -> int:
        """The size of the frame that was read last, without its prefix and table."""
        return self._head_length + sum(length for _, length in self._entries)

    def whole(self, data: bytes) -> tuple[Any, list[Attachment]] | None:
        """The short way for the usual case: the frame that ``data`` is, exactly and without attachments.

        None if it is not, or if a frame has begun: feed it then. The header of what most turns end with is not parsed again.

        Raises:
            WireError: its header is not JSON.
        """
        if self._dead or self._stage or self._buffer or len(data) < _PREFIX.size:
            return None
        if data == _USUAL_FRAME:
            self._head_length, self._entries = len(data) - _PREFIX.size, []
            return USUAL_HEADER, []
        magic, version, flags, head_length, count = _PREFIX.unpack_from(data)
        if magic != MAGIC or flags or version != PROTOCOL_VERSION or count or head_length != len(data) - _PREFIX.size:
            return None
        if head_length > MAX_HEADER_BYTES or head_length > self._max_bytes:
            return None
        self._head_length, self._entries = head_length, []
        try:
            return load_header(data[_PREFIX.size :]), []
        except WireError:
            self._dead = True
            raise

    def feed(self, data: bytes | memoryview) -> tuple[Any, list[Attachment]] | None:
        """Take bytes; return ``(header, attachments)`` when they complete a frame.

        Raises:
            WireError: the bytes are not a frame this version reads, or announce more than the caps.
        """
        if self._dead:
            raise WireError("the stream has already failed; frames are never resynchronised")
        try:
            return self._feed(data)
        except WireError:
            self._dead = True
            raise

    def _feed(self, data: bytes | memoryview) -> tuple[Any, list[Attachment]] | None:
        self._buffer += data
        while len(self._buffer) >= self._want:
            chunk = bytes(self._buffer)
            self._buffer = bytearray()
            if len(chunk) > self._want:
                raise WireError("more bytes were fed than were wanted")
            done = self._advance(chunk)
            if done is not None:
                return done
        return None

    def _advance(self, chunk: bytes) -> tuple[Any, list[Attachment]] | None:
        if self._stage == 0:
            self._start(chunk)
        elif self._stage == 1:
            self._table(chunk)
        else:
            self._parts.append(chunk)
        self._stage += 1
        while True:
            if self._stage == 1:
                if self._entries_wanted:
                    self._want = self._entries_wanted * _ENTRY.size
                    return None
                self._stage = 2
            index = self._stage - 2
            if index > len(self._entries):
                return self._finish()
            self._want = self._head_length if index == 0 else self._entries[index - 1][1]
            if self._want:
                return None
            self._parts.append(b"")
            self._stage += 1

    def _start(self, chunk: bytes) -> None:
        magic, version, flags, head_length, count = _PREFIX.unpack(chunk)
        if magic != MAGIC or flags:
            raise WireError("the bytes are not a frame")
        if version != PROTOCOL_VERSION:
            raise WireError(f"the peer speaks protocol version {version}, this side {PROTOCOL_VERSION}; rebuild the older one")
        if head_length > MAX_HEADER_BYTES or head_length > self._max_bytes or count > MAX_ATTACHMENTS:
            raise FrameTooLarge("a frame announces more than the protocol allows")
        self._head_length = head_length
        self._entries_wanted = count
        self._entries = []
        self._parts = []

    def _table(self, chunk: bytes) -> None:
        self._entries = list(_ENTRY.iter_unpack(chunk))
        if any(kind not in _KINDS for kind, _ in self._entries):
            raise WireError("a frame has an attachment of an unknown kind")
        if self._head_length + sum(length for _, length in self._entries) > self._max_bytes:
            raise FrameTooLarge("a frame announces more than the cap")

    def _finish(self) -> tuple[Any, list[Attachment]]:
        head, *raw = self._parts
        self._stage, self._want, self._parts = 0, _PREFIX.size, []
        header = load_header(head)
        attachments: list[Attachment] = []
        for (kind, _), data in zip(self._entries, raw, strict=True):
            try:
                attachments.append(data if kind == 0 else data.decode("utf-8", "surrogatepass"))
            except UnicodeDecodeError:
                raise WireError("a text attachment is not valid UTF-8") from None
        return header, attachments


#: A JSON string with its quotes. Linear on hostile bytes too: each byte has one way to match, a match is never given
#: back, and one without its closing quote takes the rest, so that the search never starts again inside it.
_STRING: Final = re.compile(rb'"(?>[^"\\]++|\\.)*+"?', re.DOTALL)


def _tokens(head: bytes) -> int:
    """Commas and opening brackets of a header; those inside its texts do not count, but are cheap to count first."""
    tokens = head.count(b",") + head.count(b"[") + head.count(b"{")
    if tokens <= MAX_HEADER_TOKENS or head.count(b'"') > 2 * MAX_HEADER_TOKENS:
        return tokens
    bare = _STRING.sub(b"", head)
    return bare.count(b",") + bare.count(b"[") + bare.count(b"{")


def _no_constant(name: str) -> Any:
    raise ValueError("NaN and infinities are not allowed in a header")


def _short_int(text: str) -> int:
    if len(text) > 17:
        raise ValueError("an integer is too long")
    return int(text)


# Made once: a coder for each message would cost more than the message. Headers are trees: nothing in them contains itself.
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False)


def _prepared_encoder() -> Callable[[Any], str]:
    """``_ENCODER.encode`` without making the encoder in C anew each time, which takes longer than its work."""
    make = getattr(json.encoder, "c_make_encoder", None)
    sample = ["\u00e9\n", 1, None, True, ["d"], {"a": 0.5}]
    try:
        prepared = make(None, _ENCODER.default, json.encoder.encode_basestring, None, ":", ",", False, False, False)  # type: ignore[misc]
        if "".join(prepared(sample, 0)) == _ENCODER.encode(sample):
            return lambda header: "".join(prepared(header, 0))
    except TypeError:  # another interpreter's
        pass
    return _ENCODER.encode


_encode: Final = _prepared_encoder()
_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)
_DECODER_OF_SHORT_INTEGERS: Final = json.JSONDecoder(parse_constant=_no_constant, parse_int=_short_int)


def _decoder() -> json.JSONDecoder:
    # By default int() itself refuses texts over 4,300 digits; a process that switched that off gets our own bound,
    # because int-from-text is quadratic. Integers that large travel as tagged hex.
    return _DECODER if 0 < sys.get_int_max_str_digits() <= 10_000 else _DECODER_OF_SHORT_INTEGERS


#: What most turns of a session end with: nothing to say. Never changed. Compared as it is, which is cheaper than building or parsing it.
USUAL_HEADER: Final = ["done", None, None, None, False, None]
_usual: Final = dump_header(USUAL_HEADER)
_DONE: Final = b'["done",'
_USUAL_FRAME: Final = _PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, len(_usual), 0) + _usual
