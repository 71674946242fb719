"""`OutputCapture`: what a cell prints, bounded while it is produced."""

from __future__ import annotations

from collections import deque
from typing import Final

from ...results import Stream

__all__ = ("OutputCapture",)

#: Pieces of output are at least this long on average, or they are joined: many tiny prints must not cost much more
#: than their text.
_JOIN_BYTES: Final = 4096


class _Piece:
    __slots__ = ("data", "stream")

    def __init__(self, stream: Stream, data: bytes) -> None:
        self.stream = stream
        self.data = data


class OutputCapture:
    """Head and tail of both streams together, at most ``limit`` bytes of UTF-8; the middle is counted and dropped.

    Written by one thread; read after the cell. ``limit`` None keeps everything.
    """

    def __init__(self, limit: int | None) -> None:
        self._head_left = limit if limit is None else limit - limit // 2
        self._tail_limit = 0 if limit is None else limit // 2
        self._head: list[_Piece] = []
        self._tail: deque[_Piece] = deque()
        self._tail_bytes = 0
        self.written = 0
        self.dropped = 0

    def write(self, stream: Stream, text: str) -> None:
        """Take a piece of output."""
        data = text.encode("utf-8", "surrogatepass")
        self.written += len(data)
        if self._head_left is None:
            self._append(self._head, stream, data)
            return
        if self._head_left:
            head = data[: self._head_left]
            self._head_left -= len(head)
            self._append(self._head, stream, head)
            data = data[len(head) :]
        if data:
            self._append(self._tail, stream, data)
            self._tail_bytes += len(data)
            self._trim()

    @staticmethod
    def _append(pieces: list[_Piece] | deque[_Piece], stream: Stream, data: bytes) -> None:
        if pieces and pieces[-1].stream == stream and len(pieces[-1].data) + len(data) <= _JOIN_BYTES:
            pieces[-1].data += data
        else:
            pieces.append(_Piece(stream, data))

    def _trim(self) -> None:
        while (over := self._tail_bytes - self._tail_limit) > 0:
            first = self._tail[0]
            if len(first.data) <= over:
                self._tail.popleft()
                gone = len(first.data)
            else:
                first.data = first.data[over:]
                gone = over
            self._tail_bytes -= gone
            self.dropped += gone

    def text(self, stream: Stream) -> str:
        """What was kept of a stream. A character cut in half at the seam is left out."""
        return b"".join(piece.data for part in (self._head, self._tail) for piece in part if piece.stream == stream).decode(
            "utf-8", "ignore"
        )
