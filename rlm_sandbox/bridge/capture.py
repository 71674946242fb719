"""`Capture`: what a cell printed, bounded while it is produced: a head, a tail, and a count of what lay between."""

from __future__ import annotations

import codecs
import collections
import logging
from collections.abc import Callable
from typing import Final

from ..results import OutputChunk, Stream

__all__ = ("Capture",)

log: Final = logging.getLogger("rlm_sandbox.output")

#: Pieces of the tail are kept no smaller than this on average, so that a guest printing single bytes costs no more.
_PIECE: Final = 4096


class Capture:
    """Collects the output of one cell. ``cap`` bounds both streams together, in bytes; None keeps everything."""

    def __init__(self, cap: int | None, on_output: Callable[[OutputChunk], None] | None = None) -> None:
        self._head_left = None if cap is None else cap - cap // 2
        self._tail_cap = 0 if cap is None else cap // 2
        self._head: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._tail: collections.deque[tuple[Stream, bytearray]] = collections.deque()
        self._tail_size = 0
        self._dropped: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        self._on_output = on_output
        self._decoders: dict[Stream, codecs.IncrementalDecoder] = {}
        if on_output is not None:
            self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in self._head}
        self._shown_left = cap
        self.total = 0

    @property
    def dropped(self) -> int:
        """Bytes that are in neither head nor tail."""
        return sum(self._dropped.values())

    def add(self, stream: Stream, data: bytes) -> None:
        """Take what the guest wrote."""
        self.total += len(data)
        self._show(stream, data)
        if self._head_left is None:
            self._head[stream] += data
            return
        if self._head_left:
            self._head[stream] += data[: self._head_left]
            rest = data[self._head_left :]
            self._head_left -= len(data) - len(rest)
            data = rest
        if data:
            self._add_tail(stream, data)

    def _add_tail(self, stream: Stream, data: bytes) -> None:
        if len(data) > self._tail_cap:
            self._dropped[stream] += len(data) - self._tail_cap
            data = data[len(data) - self._tail_cap :]
        if self._tail and self._tail[-1][0] == stream and len(self._tail[-1][1]) < _PIECE:
            self._tail[-1][1].extend(data)
        elif data:
            self._tail.append((stream, bytearray(data)))
        self._tail_size += len(data)
        while self._tail_size > self._tail_cap:
            oldest_stream, oldest = self._tail[0]
            excess = min(self._tail_size - self._tail_cap, len(oldest))
            del oldest[:excess]
            self._dropped[oldest_stream] += excess
            self._tail_size -= excess
            if not oldest:
                self._tail.popleft()

    def _show(self, stream: Stream, data: bytes) -> None:
        if self._on_output is None:
            return
        if self._shown_left is not None:
            data = data[: self._shown_left]
            self._shown_left -= len(data)
        text = self._decoders[stream].decode(data)
        if not text:
            return
        try:
            self._on_output(OutputChunk(stream, text))
        except Exception:  # a listener's error must not cost the caller the cell's result
            log.exception("on_output raised; it is not called again in this cell")
            self._on_output = None

    def text(self, stream: Stream) -> str:
        """Head and tail of one stream, with a note where something was dropped. Raw: who renders it makes it inert."""
        if not self.total:
            return ""
        head = bytes(self._head[stream])
        tail = b"".join(bytes(data) for name, data in self._tail if name == stream)
        dropped = self._dropped[stream]
        if not dropped:
            return (head + tail).decode("utf-8", "replace")
        # A character that the cut went through is dropped whole.
        whole_head = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
        whole_tail = tail[next((at for at in range(min(4, len(tail))) if tail[at] & 0xC0 != 0x80), 0) :]
        return f"{whole_head}\n[... {dropped} bytes dropped ...]\n{whole_tail.decode('utf-8', 'replace')}"
