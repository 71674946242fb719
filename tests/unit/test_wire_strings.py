"""Frames as one text: every attachment comes back as it was, and a guest's frame is taken for nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from rlm_sandbox.wire.codec import Attachment, WireError
from rlm_sandbox.wire.frames import FrameTooLarge
from rlm_sandbox.wire.strings import dump_string, load_string, pack_text, unpack_text

CAP = 1 << 20


@pytest.mark.parametrize(
    "attachments",
    [
        [],
        ["text"],
        ["", b""],
        ["é" * 600, "日本", "\U0001f600", "a\nb c\x00"],
        ["lone \ud800 and \udfff", "\ud800\udc00"],
        [bytes(range(256)), b"\xff" * 1000],
        ["t", b"b", "s\ud800"] * 50,
    ],
    ids=["none", "one", "empty", "wide", "surrogates", "bytes", "mixed"],
)
def test_a_frame_comes_back(attachments: list[Attachment]) -> None:
    header = ["done", 1, {"é": None}, "\n 3 t5"]
    frame = dump_string(header, attachments, max_chars=CAP)
    frame.encode("utf-8")  # a string of the component model is valid Unicode
    assert load_string(frame, max_chars=CAP) == (header, attachments)


def test_many_bytes_do_not_double_on_the_way() -> None:
    attachments: list[Attachment] = [b"\xff" * (6 << 20)] * 4
    frame = dump_string([], attachments, max_chars=1 << 27)
    assert len(frame.encode("utf-8")) < 1.7 * sum(map(len, attachments))
    assert load_string(frame, max_chars=1 << 27) == ([], attachments)


@pytest.mark.parametrize("text", ["", "a", "é日\U0001f600", "\ud800", "\ud83d\ude00", "b", "s"])
def test_a_text_comes_back(text: str) -> None:
    packed = pack_text(text)
    packed.encode("utf-8")
    assert unpack_text(packed) == text


@pytest.mark.parametrize(
    "frame",
    [
        "", "\n", "3", "3\n", "3\n[]", "2\n[]x", "2 t1\n[]", "2 t1\n[]ab", "2 x1\n[]a", "2 B3\n[]abc", "2 b1\n[]\u0100", "2 s4\n[]gICA", "-2\n[]", "+2\n[]",
        "2 t-1\n[]", "٢\n[]", "02x\n[]", "2  t1\n[]a", " 2\n[]", "9999999999999\n[]", "2 t9999999999999\n[]", "2\n[1", "5\n[NaN]",
    ],
)  # fmt: skip
def test_what_is_no_frame_is_refused(frame: str) -> None:
    with pytest.raises(WireError):
        load_string(frame, max_chars=CAP)


def test_a_long_table_is_refused_before_it_is_split() -> None:
    with pytest.raises(WireError):
        load_string("2" + " t0" * 100_000 + "\n[]", max_chars=CAP)
    with pytest.raises(WireError):
        load_string("2" * 500_000 + "\n[]", max_chars=CAP)


@pytest.mark.parametrize("value", ["", "x", "bAA", "b!", "sgICA", "sAAAA\n"])
def test_what_is_no_text_is_refused(value: str) -> None:
    with pytest.raises(WireError):
        unpack_text(value)


def test_the_caps_hold_in_both_directions() -> None:
    with pytest.raises(FrameTooLarge):
        dump_string([], ["x" * 2000], max_chars=1000)
    with pytest.raises(FrameTooLarge):
        load_string(dump_string([], ["x" * 2000], max_chars=CAP), max_chars=1000)
    with pytest.raises(FrameTooLarge):
        dump_string([], [""] * 5000, max_chars=CAP)


def test_a_header_with_lone_surrogates_is_refused() -> None:
    header: Any = ["\ud800"]
    with pytest.raises(WireError):
        dump_string(header, [], max_chars=CAP)
