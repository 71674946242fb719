"""Frames: exact round trips, caps before allocation, and hostile bytes raise `WireError` and nothing else."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_sandbox.wire import frames
from rlm_sandbox.wire.codec import MAX_ATTACHMENTS, Attachment, WireError
from rlm_sandbox.wire.frames import FrameReader, FrameTooLarge, dump_frame

CAP = 1 << 20


def frame(header: Any, attachments: list[Attachment] | None = None, *, max_bytes: int = CAP) -> bytes:
    return b"".join(dump_frame(header, attachments or [], max_bytes=max_bytes))


def raw_frame(
    head: bytes = b"[]",
    parts: tuple[tuple[int, bytes], ...] = (),
    *,
    magic: int = frames.MAGIC,
    version: int = frames.PROTOCOL_VERSION,
    flags: int = 0,
) -> bytes:
    prefix = struct.pack("<HBBII", magic, version, flags, len(head), len(parts))
    table = b"".join(struct.pack("<BQ", kind, len(data)) for kind, data in parts)
    return prefix + table + head + b"".join(data for _, data in parts)


def read_all(data: bytes, reader: FrameReader | None = None, step: int | None = None) -> Iterator[tuple[Any, list[Attachment]]]:
    """The frames in ``data``, fed as an owner of a reader does: never more than is wanted."""
    reader = reader or FrameReader(max_bytes=CAP)
    at = 0
    while at < len(data):
        size = min(reader.wanted, step or reader.wanted)
        done = reader.feed(data[at : at + size])
        at += size
        if done is not None:
            yield done


_HEADERS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 53), 1 << 53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=15,
)
_ATTACHMENTS = st.lists(st.binary(max_size=40) | st.text(st.characters(codec=None, exclude_categories=()), max_size=20), max_size=4)


@settings(max_examples=150)
@given(header=_HEADERS, attachments=_ATTACHMENTS, step=st.sampled_from([None, 1, 3]))
def test_frames_round_trip_however_the_bytes_come(header: Any, attachments: list[Attachment], step: int | None) -> None:
    data = frame(header, attachments)
    assert list(read_all(data * 2, step=step)) == [(header, attachments)] * 2


def test_a_reader_wants_something_until_the_frame_is_done() -> None:
    data = frame(["exec", 1], ["text", b"", "", b"raw"])
    reader = FrameReader(max_bytes=CAP)
    assert not reader.mid_frame
    for index, byte in enumerate(data):
        assert reader.wanted > 0
        done = reader.feed(bytes([byte]))
        assert (done is not None) == (index == len(data) - 1)
        assert reader.mid_frame == (index < len(data) - 1)


def test_truncated_at_every_byte_is_told_from_the_end_of_the_stream() -> None:
    data = frame(["done", None], ["a" * 10, b"b"])
    for length in range(len(data)):
        reader = FrameReader(max_bytes=CAP)
        assert list(read_all(data[:length], reader)) == []
        assert reader.mid_frame == (length > 0)


def test_feeding_more_than_is_wanted_is_refused() -> None:
    with pytest.raises(WireError):
        FrameReader(max_bytes=CAP).feed(frame(["x"]))


# ---- caps, before anything is allocated


@pytest.mark.parametrize(
    "prefix",
    [
        struct.pack("<HBBII", frames.MAGIC, frames.PROTOCOL_VERSION, 0, 0xFFFF_FFFF, 0),
        struct.pack("<HBBII", frames.MAGIC, frames.PROTOCOL_VERSION, 0, CAP + 1, 0),
        struct.pack("<HBBII", frames.MAGIC, frames.PROTOCOL_VERSION, 0, 2, 0xFFFF_FFFF),
        struct.pack("<HBBII", frames.MAGIC, frames.PROTOCOL_VERSION, 0, 2, MAX_ATTACHMENTS + 1),
    ],
)
def test_an_oversize_announcement_is_refused_at_once(prefix: bytes) -> None:
    with pytest.raises(FrameTooLarge):
        FrameReader(max_bytes=CAP).feed(prefix)


@pytest.mark.parametrize("lengths", [[CAP], [1 << 63], [CAP // 2, CAP // 2], [0xFFFF_FFFF_FFFF_FFFF] * 3])
def test_oversize_attachments_are_refused_from_the_table(lengths: list[int]) -> None:
    reader = FrameReader(max_bytes=CAP)
    reader.feed(struct.pack("<HBBII", frames.MAGIC, frames.PROTOCOL_VERSION, 0, 2, len(lengths)))
    with pytest.raises(FrameTooLarge):
        reader.feed(b"".join(struct.pack("<BQ", 0, length) for length in lengths))


@settings(max_examples=200)
@given(data=st.binary(max_size=200))
def test_a_reader_never_wants_more_than_the_cap(data: bytes) -> None:
    reader = FrameReader(max_bytes=500)
    at = 0
    try:
        while at < len(data):
            size = reader.wanted
            assert 0 < size <= max(500, MAX_ATTACHMENTS * 9)
            reader.feed(data[at : at + size])
            at += size
    except WireError:
        pass


def test_an_oversize_frame_is_refused_by_the_sender_too() -> None:
    with pytest.raises(FrameTooLarge):
        dump_frame(["x"], [b"a" * 1_000], max_bytes=1_000)
    with pytest.raises(FrameTooLarge):
        dump_frame(["x"], [b""] * (MAX_ATTACHMENTS + 1), max_bytes=CAP)
    assert dump_frame(["x"], [b"a" * 900], max_bytes=1_000)


def test_the_cap_counts_bytes_and_not_characters() -> None:
    with pytest.raises(FrameTooLarge):
        dump_frame(["x"], ["\U0001f600" * 300], max_bytes=1_000)


def test_too_many_elements_are_refused_before_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_HEADER_TOKENS", 50)
    for head in (b"[" + b"0," * 60 + b"0]", b"[" * 60 + b"]" * 60, b"{" * 60, b'["' + b'",","' * 60 + b'"]'):
        with pytest.raises(FrameTooLarge):
            list(read_all(raw_frame(head)))
    with pytest.raises(FrameTooLarge):
        dump_frame([0] * 60, [], max_bytes=CAP)


def test_commas_inside_texts_are_not_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_HEADER_TOKENS", 50)
    header = [",[{" * 100, '\\",' * 10]
    assert list(read_all(frame(header))) == [(header, [])]


# ---- hostile bytes


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 12,
        raw_frame(magic=0x4C53),
        raw_frame(version=frames.PROTOCOL_VERSION + 1),
        raw_frame(version=0),
        raw_frame(flags=1),
        raw_frame(b""),
        raw_frame(b"not json"),
        raw_frame(b"[1] [2]"),
        raw_frame(b"[NaN]"),
        raw_frame(b"[-Infinity]"),
        raw_frame(b'["\xff"]'),
        raw_frame(b"[" * 100_000),
        raw_frame(b"[" * 100_000 + b"]" * 100_000),
        raw_frame(b"1" * 100_000),
        raw_frame(b"[]", ((2, b"x"),)),
        raw_frame(b"[]", ((1, b"\xff\xfe"),)),
        raw_frame(b"[]", ((1, b"\xed\xa0"),)),
    ],
    ids=range(17),
)
def test_bytes_that_are_no_frame_are_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        list(read_all(data))


def test_a_long_integer_is_refused_even_where_python_would_parse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "get_int_max_str_digits", lambda: 0)
    with pytest.raises(WireError):
        list(read_all(raw_frame(b"1" * 18)))
    assert list(read_all(raw_frame(b"-9007199254740992"))) == [(-(1 << 53), [])]


@settings(max_examples=300)
@given(data=st.binary(max_size=120), header=st.sampled_from([b"", raw_frame(b'["x",1]', ((1, b"t"),))[:12]]))
def test_any_bytes_are_frames_or_a_wire_error(data: bytes, header: bytes) -> None:
    with contextlib.suppress(WireError):
        list(read_all(header + data))


@settings(max_examples=200)
@given(data=st.data())
def test_a_flipped_byte_is_a_frame_or_a_wire_error(data: st.DataObject) -> None:
    original = bytearray(frame(["done", ["a", 0], {"k": 1.5}], ["text é", b"\x00\x01"]))
    at = data.draw(st.integers(0, len(original) - 1))
    original[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        list(read_all(bytes(original)))


def test_a_failed_stream_stays_dead() -> None:
    reader = FrameReader(max_bytes=CAP)
    with pytest.raises(WireError):
        list(read_all(raw_frame(b"not json"), reader))
    with pytest.raises(WireError):
        list(read_all(frame(["exec"]), reader))


def test_a_header_with_surrogates_is_refused_by_the_sender() -> None:
    with pytest.raises(WireError):
        dump_frame(["\ud800"], [], max_bytes=CAP)


def test_a_float_that_json_cannot_carry_is_refused_by_the_sender() -> None:
    """1e999 is read as infinity; found by fuzzing."""
    ((header, _),) = read_all(raw_frame(b"[1e999]"))
    with pytest.raises(WireError):
        dump_frame(header, [], max_bytes=CAP)


# ---- version 1 for ever

GOLDEN: list[tuple[list[Any], list[Attachment], str]] = [
    (["get", "x"], [], "524c01000b000000000000005b22676574222c2278225d"),
    (
        ["set", "é", ["l", ["a", 0], ["a", 1]]],
        ["\ud800t", b"\x00\xff"],
        ("524c01002200000002000000"
        "010400000000000000000200000000000000"
        "5b22736574222c22c3a9222c5b226c222c5b2261222c305d2c5b2261222c315d5d5d"
        "eda0807400ff"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("header", "attachments", "golden"), GOLDEN)
def test_golden_frames_of_version_1(header: list[Any], attachments: list[Attachment], golden: str) -> None:
    """A change here needs a new PROTOCOL_VERSION: an older peer could not read what this side writes."""
    assert frames.PROTOCOL_VERSION == 1
    data = bytes.fromhex(golden)
    assert frame(header, attachments) == data
    assert list(read_all(data)) == [(header, attachments)]


def test_the_frame_is_json_in_the_middle() -> None:
    data = frame(["x", {"a": [1, "é"]}])
    assert json.loads(data[12:]) == ["x", {"a": [1, "é"]}]
