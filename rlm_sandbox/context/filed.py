"""`StoredText`: a stored text as the host reads it, by parts, so that a text larger than its memory stays where it is."""

from __future__ import annotations

import mmap
from typing import Final

from .stored import CODECS, MemoryFile, decode_stored

__all__ = ("StoredText",)

#: Decoded at once when the whole text is wanted.
_PIECE_CHARS: Final = 1 << 22


class StoredText:
    """The operations of a ``str`` that a context needs, on a sealed file. Each costs what it returns, a search a pass."""

    def __init__(self, file: MemoryFile) -> None:
        self._chars, self._width = file.chars, file.width
        self._map = mmap.mmap(file.fd, 0, prot=mmap.PROT_READ)

    def __len__(self) -> int:
        return self._chars

    def __getitem__(self, key: int | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(self._chars)
            return (
                self._part(start, max(start, stop))
                if step == 1
                else "".join([self._part(at, at + 1) for at in range(start, stop, step)])
            )
        at = range(self._chars)[key]
        return self._part(at, at + 1)

    def _part(self, start: int, stop: int) -> str:
        return decode_stored(self._map[start * self._width : stop * self._width], self._width)

    def __contains__(self, part: str) -> bool:
        return self.find(part) >= 0

    def find(self, part: str, start: int = 0, stop: int | None = None) -> int:
        """See ``str.find``."""
        start, stop, _ = slice(start, stop).indices(self._chars)
        try:
            wanted = part.encode(CODECS[self._width], "surrogatepass")
        except UnicodeEncodeError:
            return -1
        if len(wanted) != len(part) * self._width:
            return -1
        at = start * self._width
        while (at := self._map.find(wanted, at, stop * self._width)) >= 0:
            if at % self._width == 0:
                return at // self._width
            at += 1
        return -1

    def load(self) -> str:
        """The whole text, in this process's memory."""
        return "".join([self._part(at, min(self._chars, at + _PIECE_CHARS)) for at in range(0, self._chars, _PIECE_CHARS)])
