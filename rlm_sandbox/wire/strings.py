"""A frame as one text, for a guest that is called with strings and not over a byte stream.

Layout: a table, a line feed, the header's JSON, the attachments. The table has the header's length in characters and, for
each attachment, a letter and a length: ``t`` a text, ``s`` a text with lone surrogates (which a string of the component
model may not have), ``b`` bytes, ``B`` many bytes. A byte is a character, which measured twice as fast as base64 (8 MiB out of a
guest: 30 ms and 56 ms); but half of them take two bytes on the way, and what may cross at once is bounded, so surrogates
and many bytes go as base64. One string and no list of them, because a list's elements are made one by one on the host: a
million empty ones would cost it more than a second.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from typing import Any, Final

from .codec import MAX_ATTACHMENTS, Attachment, WireError
from .frames import MAX_HEADER_BYTES, USUAL_HEADER, FrameTooLarge, dump_header, load_header

__all__ = ("dump_string", "load_string", "pack_text", "unpack_text")

_TEXT: Final = "t"
_SURROGATES: Final = "s"
_BYTES: Final = "b"
_MANY_BYTES: Final = "B"
#: Bytes of one frame that go as characters.
_RAW_BYTES: Final = 16 << 20
_MAX_DIGITS: Final = 12
_MAX_TABLE: Final = (MAX_ATTACHMENTS + 1) * (_MAX_DIGITS + 2)


def _is_valid(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _pack(part: Attachment, raw_left: int = 0) -> tuple[str, str]:
    if isinstance(part, bytes):
        return (_BYTES, part.decode("latin-1")) if len(part) <= raw_left else (_MANY_BYTES, _base64(part))
    if _is_valid(part):
        return _TEXT, part
    return _SURROGATES, _base64(part.encode("utf-8", "surrogatepass"))


def _unpack(kind: str, packed: str) -> Attachment:
    if kind == _TEXT:
        return packed
    if kind not in (_SURROGATES, _BYTES, _MANY_BYTES):
        raise WireError("a frame has an attachment of an unknown kind")
    try:
        if kind == _BYTES:
            return packed.encode("latin-1")
        data = binascii.a2b_base64(packed, strict_mode=True)
        return data if kind == _MANY_BYTES else data.decode("utf-8", "surrogatepass")
    except ValueError:
        raise WireError("an attachment is malformed") from None


def pack_text(text: str) -> str:
    """A text as one string that is valid Unicode."""
    return "".join(_pack(text))


def unpack_text(packed: str) -> str:
    """What `pack_text` was given.

    Raises:
        WireError: it was given nothing like this.
    """
    text = _unpack(packed[:1], packed[1:])
    if isinstance(text, bytes):
        raise WireError("a text is malformed")
    return text


def dump_string(header: Any, attachments: Sequence[Attachment], *, max_chars: int) -> str:
    """The frame as one text.

    Raises:
        FrameTooLarge: it is larger than ``max_chars``; nothing was sent.
        WireError: the header has lone surrogates outside an attachment.
    """
    if not attachments and header == USUAL_HEADER and len(_USUAL_FRAME) <= max_chars:
        return _USUAL_FRAME
    if len(attachments) > MAX_ATTACHMENTS:
        raise FrameTooLarge("the frame has more attachments than the protocol allows")
    head = dump_header(header).decode("utf-8")
    if not attachments:
        frame = f"{len(head)}\n{head}"
    else:
        packed = []
        raw_left = _RAW_BYTES
        for part in attachments:
            packed.append(_pack(part, raw_left))
            raw_left -= len(part) if packed[-1][0] == _BYTES else 0
        table = " ".join([str(len(head)), *(f"{kind}{len(data)}" for kind, data in packed)])
        frame = "".join([table, "\n", head, *(data for _, data in packed)])
    if len(frame) > max_chars:
        raise FrameTooLarge(f"the frame is larger than {max_chars} characters")
    return frame


def load_string(frame: str, *, max_chars: int) -> tuple[Any, list[Attachment]]:
    """Header and attachments of a frame.

    Raises:
        WireError: it is none, or larger than the caps.
    """
    if len(frame) > max_chars:
        raise FrameTooLarge("a frame is larger than the cap")
    if frame == _USUAL_FRAME:
        return USUAL_HEADER, []
    at = frame.find("\n", 0, _MAX_TABLE)
    if at < 0:
        raise WireError("a frame has no table")
    length, *entries = frame[:at].split(" ")
    if len(entries) > MAX_ATTACHMENTS:
        raise FrameTooLarge("a frame has more attachments than the protocol allows")
    at += 1
    end = at + _length(length)
    if end - at > MAX_HEADER_BYTES:
        raise FrameTooLarge("a frame's header is larger than the protocol allows")
    try:
        header = load_header(frame[at:end].encode("utf-8"))
    except UnicodeEncodeError:
        raise WireError("a frame's header is not valid Unicode") from None
    attachments: list[Attachment] = []
    for entry in entries:
        at, end = end, end + _length(entry[1:])
        attachments.append(_unpack(entry[:1], frame[at:end]))
    if end != len(frame):
        raise WireError("a frame is not as long as its table says")
    return header, attachments


def _length(digits: str) -> int:
    if not (0 < len(digits) <= _MAX_DIGITS and digits.isascii() and digits.isdigit()):
        raise WireError("a frame's table is malformed")
    return int(digits)


_usual: Final = dump_header(USUAL_HEADER).decode()
#: See `USUAL_HEADER`.
_USUAL_FRAME: Final = f"{len(_usual)}\n{_usual}"
