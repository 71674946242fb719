"""Coverage-guided fuzzing of `Decoder` and `Encoder`: a tree is a value or a `WireError`, and a value that was read crosses again.

Run by ``make fuzz``, or: ``python fuzz/fuzz_codec.py fuzz/corpus/codec -max_total_time=60``.
"""

from __future__ import annotations

import json
import sys

import atheris

with atheris.instrument_imports(include=["rlm_sandbox.wire"]):
    from rlm_sandbox.wire.codec import Decoder, Encoder, ValueRefused, WireError

ATTACHMENTS = ["text", b"bytes", "\ud800", ""]


def one_input(data: bytes) -> None:
    """The bytes as JSON text of a tree; the first says whether handles are allowed."""
    try:
        tree = json.loads(data[1:])
    except (ValueError, RecursionError):
        return
    try:
        value = Decoder(ATTACHMENTS, allow_handles=bool(data[0] & 1)).decode(tree)
    except WireError:
        return
    encoder = Encoder()
    try:
        again = encoder.encode(value)
    except ValueRefused:
        raise AssertionError("a value that was accepted cannot be sent on") from None
    text = json.dumps(again, allow_nan=False)
    back = Decoder(encoder.attachments, allow_handles=True).decode(json.loads(text))
    assert repr(back) == repr(value) or "{" in repr(value), "a value changes when it crosses again"  # sets have no order


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
