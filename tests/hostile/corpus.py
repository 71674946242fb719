"""What a guest may send instead of the end of its turn, by name. Every one of them is a breach: the guest dies of it.

The fuzzer of frames starts from the small ones (``python -m tests.hostile.corpus`` writes them to ``fuzz/corpus/frames``).
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any, Final

from rlm_sandbox.wire.codec import MAX_ATTACHMENTS, MAX_DEPTH, MAX_ELEMENTS, MAX_EQUAL_HASHES, MAX_UNSEEDED_KEYS
from rlm_sandbox.wire.frames import MAGIC, PROTOCOL_VERSION
from rlm_sandbox.wire.messages import SCHEMA, Done, Suspend, dump_message

from .scripted_guest import done, frame, raw_frame

#: The ``value_bytes`` of the session that gets them.
VALUE_BYTES: Final = 1 << 20


def _prefix(head: int, count: int) -> bytes:
    return struct.pack("<HBBII", MAGIC, PROTOCOL_VERSION, 0, head, count)


def _entries(*lengths: int, kind: int = 0) -> bytes:
    return b"".join(struct.pack("<BQ", kind, length) for length in lengths)


def _nested(tag: str, depth: int) -> Any:
    tree: Any = [tag]
    for _ in range(depth):
        tree = [tag, tree]
    return tree


def _raw(header: Any) -> bytes:
    """A frame of a header that the sender's own checks would refuse."""
    return raw_frame(json.dumps(header).encode())


_PRIME: Final = (1 << 61) - 1
_CALL: Final[list[Any]] = [1, 1, None, ["l"], ["d"]]
_GOOD: Final = {"done": dump_message(Done(None, None, None, False, None)), "suspend": dump_message(Suspend([_CALL], False))}
#: None of them is right in any field of an event.
_WRONG: Final[dict[str, Any]] = {
    "an object": {},
    "a float": 1.5,
    "a text": "text",
    "a number": 3,
    "lists of numbers": [[1], 2],
    "numbers": [1, 2],
    "a nested tag": ["l", ["?"]],
}


def _wrong_fields() -> dict[str, bytes]:
    """Each field of each event with a value of every wrong type."""
    cases = {}
    for op, header in _GOOD.items():
        for index, line in enumerate(SCHEMA[op], start=1):
            name, _, kind = line.partition(": ")
            for label, value in _WRONG.items():
                if kind == "Any" and (name == "value" or value is None) and label in ("a float", "a text", "a number"):
                    continue  # a tree may be any scalar; only `read` must be a dict
                cases[f"{op}.{name} is {label}"] = _raw([*header[:index], value, *header[index + 1 :]])
        cases[f"{op} with a field too few"] = _raw(header[:-1])
        cases[f"{op} with a field too many"] = _raw([*header, None])
    junk: tuple[Any, ...] = ({}, 1.5, [], True)
    for index, label in enumerate(("number", "handle", "method")):
        for wrong in junk:
            call = [*_CALL[:index], wrong, *_CALL[index + 1 :]]
            cases[f"a call's {label} is {wrong!r}"] = _raw(["suspend", [call], False])
    for size in (0, 1, 4, 6):
        cases[f"a call of {size} fields"] = _raw(["suspend", [(_CALL * 2)[:size]], False])
    return cases


FRAMES: Final[dict[str, bytes]] = {
    "zeros": b"\0" * 12,
    "text": b"HTTP/1.1 200 OK\r\n\r\n",
    "another magic": raw_frame(magic=0x4C53),
    "a newer version": raw_frame(version=PROTOCOL_VERSION + 1),
    "version 0": raw_frame(version=0),
    "flags": raw_frame(flags=1),
    "a header of 4 GB announced": _prefix(0xFFFF_FFFF, 0),
    "a header above the cap announced": _prefix(VALUE_BYTES + (1 << 23), 0),
    "four billion attachments announced": _prefix(2, 0xFFFF_FFFF),
    "one attachment too many announced": _prefix(2, MAX_ATTACHMENTS + 1),
    "10 GB announced": _prefix(2, 1) + _entries(10 << 30),
    "10 GB of text announced": _prefix(2, 1) + _entries(10 << 30, kind=1),
    "all of 64 bits announced": _prefix(2, 1) + _entries((1 << 64) - 1),
    "a sum beyond 64 bits announced": _prefix(2, 3) + _entries(*[(1 << 64) - 1] * 3),
    "a sum above the cap announced": _prefix(2, 4096) + _entries(*[1 << 16] * 4096),
    "an unknown kind of attachment": raw_frame(b"[]", ((2, b"x"),)),
    "an empty header": raw_frame(b""),
    "no JSON": raw_frame(b"not json"),
    "two JSON texts": raw_frame(b"[1] [2]"),
    "NaN": raw_frame(b'["done",NaN,null,null,false,null]'),
    "-Infinity": raw_frame(b'["done",-Infinity,null,null,false,null]'),
    "a float beyond all floats": raw_frame(b'["done",1e999,null,null,false,null]'),
    "invalid UTF-8": raw_frame(b'["done","\xff",null,null,false,null]'),
    "overlong UTF-8": raw_frame(b'["done","\xc0\xaf",null,null,false,null]'),
    "an encoded surrogate": raw_frame(b'["done","\xed\xa0\x80",null,null,false,null]'),
    "UTF-16": raw_frame('["done"]'.encode("utf-16")),
    "a byte order mark": raw_frame(b"\xef\xbb\xbf[]"),
    "deep nesting": raw_frame(b"[" * 100_000 + b"]" * 100_000),
    "deep nesting without an end": raw_frame(b"[" * 1_000_000),
    "deep objects": raw_frame(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a number of a million digits": raw_frame(b'["done",' + b"1" * 1_000_000 + b",null,null,false,null]"),
    "text that is no UTF-8": raw_frame(b'["done",["a",0],null,null,false,null]', ((1, b"\xff\xfe"),)),
    "text cut inside a character": raw_frame(b'["done",["a",0],null,null,false,null]', ((1, b"\xe2\x82"),)),
}

MESSAGES: Final[dict[str, bytes]] = {
    "null": frame([None]),
    "a number": raw_frame(b"5"),
    "an object": raw_frame(b"{}"),
    "an empty list": raw_frame(b"[]"),
    "an unknown message": frame(["nothing"]),
    "a dunder": frame(["__class__"]),
    "a second hello": frame(["hello", 1, 1]),
    "a hello of another generation": frame(["hello", 1, 999]),
    "output in the channel": frame(["output", "stdout", "text"]),
    "a forged exec": frame(["exec", 1, "x = 1", [], None]),
    "a forged configure": frame(["configure", None, None, ""]),
    "a forged resume": frame(["resume", [[1, "yes", None]]]),
    "a forged forget": frame(["forget", "no reason"]),
    "a forged protect": frame(["protect"]),
    "a forged bind": frame(["bind", "f", 1, "function", "function", [], [], []]),
    "a forged get": frame(["get", "x"]),
    **_wrong_fields(),
    "a failure of two texts": _raw(["done", None, None, ["a", "b"], False, None]),
    "a failure of four texts": _raw(["done", None, None, ["a", "b", "c", "d"], False, None]),
    "a read that nobody asked for": done(read=["d", "secret", 1]),
    "a read with a number for a name": done(read=["d", 1, 1]),
    "a read that is a list": done(read=["l", 1]),
    "two ends at once": done() + done(),
    "an end and half a frame": done() + done()[:7],
    "an end and a suspension": done() + frame(["suspend", [_CALL], False]),
    "waiting for no call": frame(["suspend", [], False]),
    "polling for no call": frame(["suspend", [], True]),
    "a number used twice": _raw(["suspend", [_CALL, _CALL], False]),
    "numbers that fall": _raw(["suspend", [[5, *_CALL[1:]], [4, *_CALL[1:]]], False]),
    "the number 0": _raw(["suspend", [[0, *_CALL[1:]]], False]),
    "a negative number": _raw(["suspend", [[-1, *_CALL[1:]]], False]),
    "too many calls at once": _raw(["suspend", [[n, *_CALL[1:]] for n in range(1, 1_200)], False]),
    "a call that is good and one that is not": _raw(["suspend", [_CALL, [2, 1, None, ["l", ["?"]], ["d"]]], False]),
}

VALUES: Final[dict[str, bytes]] = {
    "an attachment that is not there": done(["a", 0]),
    "an attachment before the first": done(["a", -1], attachments=["x"]),
    "an attachment named twice": done(["l", ["a", 0], ["a", 0]], attachments=["x"]),
    "an attachment named in both values": done(["a", 0], ["d", ["a", 0], 1], attachments=["x"]),
    "an attachment named true": done(["a", True], attachments=["x"]),
    "a handle": done(["h", 1, "T", [], [], []]),
    "a handle inside": done(["l", ["d", "k", ["h", 1, "T", [], [], []]]]),
    "an unknown tag": done(["x", 1]),
    "an empty list": done([]),
    "a list without a tag": done([1, 2]),
    "too deep": done(_nested("l", MAX_DEPTH + 1)),
    "too deep a key": done(["d", _nested("t", MAX_DEPTH + 1), 1]),
    "too many elements": done(["l", *[0] * (MAX_ELEMENTS + 1)]),
    "too many elements together": done(["l", *[0] * (MAX_ELEMENTS // 2)], ["d", "x", ["l", *[0] * (MAX_ELEMENTS // 2)]]),
    "a dict of one": done(["d", 1]),
    "a key that is a list": done(["d", ["l"], 1]),
    "a set of dicts": done(["s", ["d"]]),
    "keys that collide": done(["s", *(["i", hex(n * _PRIME)] for n in range(MAX_EQUAL_HASHES + 1))]),
    "too many keys without a secret hash": done(["s", *range(MAX_UNSEEDED_KEYS + 1)]),
    "a tagged float that is not special": done(["f", "1e3"]),
    "an integer in words": done(["i", "twelve"]),
    "an integer with an underscore at its end": done(["i", "0x1_"]),
    "a month of 13": done(["Y", 2026, 13, 1]),
    "a year of 10**400": raw_frame(b'["done",["Y",1' + b"0" * 400 + b",1,1],null,null,false,null]"),
    "an offset of a year": done(["T", 1, 0, 0, 0, 0, [31_536_000, 0, None]]),
    "an opaque without a repr": done(["o", "T"]),
    "an opaque of bytes": done(["o", "T", ["a", 0]], attachments=[b"x"]),
    "larger than value_bytes": done(["a", 0], attachments=[b"x" * (VALUE_BYTES + 1)]),
    "larger than value_bytes together": done(["l", ["a", 0], ["a", 1]], attachments=[b"x" * VALUE_BYTES, "y"]),
    "a value that nobody names, too large": done(attachments=[b"x" * (VALUE_BYTES + 1)]),
}

BREACHES: Final = {
    **FRAMES,
    **{f"{name} (message)": data for name, data in MESSAGES.items()},
    **{f"{name} (value)": data for name, data in VALUES.items()},
}


def write(directory: Path, limit: int = 400) -> None:
    """Put the small ones where the fuzzer of frames starts from."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in {**FRAMES, **VALUES}.items():
        if len(data) <= limit:
            (directory / f"{''.join(c if c.isalnum() else '-' for c in name)}.bin").write_bytes(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("fuzz/corpus/frames"))
