"""Coverage-guided fuzzing of `FrameReader`: bytes are frames or a `WireError`, and what a reader wants stays below its cap.

Run by ``make fuzz``, or: ``python fuzz/fuzz_frames.py fuzz/corpus/frames -max_total_time=60``.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["rlm_sandbox.wire"]):
    from rlm_sandbox.wire.codec import MAX_ATTACHMENTS, WireError
    from rlm_sandbox.wire.frames import FrameReader, dump_frame
    from rlm_sandbox.wire.messages import Message, load_message

CAP = 1 << 16
TABLE = 9


def one_input(data: bytes) -> None:
    """The bytes as one stream, whole and byte by byte; what is read is written again and read alike."""
    step = 1 + data[-1] % 64 if data else 1
    reader = FrameReader(max_bytes=CAP)
    at = 0
    try:
        while at < len(data):
            assert 0 < reader.wanted <= max(CAP, MAX_ATTACHMENTS * TABLE)
            size = min(reader.wanted, step)
            found = reader.feed(data[at : at + size])
            at += size
            if found is None:
                continue
            assert reader.frame_bytes <= CAP
            try:
                load_message(found[0], (Message,))
            except WireError:
                pass
            try:
                again = b"".join(dump_frame(*found, max_bytes=4 * CAP))
            except WireError:
                continue  # lone surrogates, which JSON can say and UTF-8 cannot
            second = FrameReader(max_bytes=4 * CAP)
            result, rest = None, memoryview(again)
            while rest:
                take = second.wanted
                result, rest = second.feed(rest[:take]), rest[take:]
            assert result == found or found[0] != found[0], "a frame that was read is not the one that is written"
    except WireError:
        assert reader.mid_frame or at <= len(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
