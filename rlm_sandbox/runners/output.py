"""Standard output and error of a worker: text over a pipe that the host reads, written through at first, then in short intervals."""

from __future__ import annotations

import io
import time
from typing import Final

__all__ = ("CellOutput",)

#: Writes of a cell that go out at once, so that what a slow or dying cell said is not lost.
_WRITTEN_THROUGH: Final = 256
#: Later writes go out when this long has passed since the last: a flood costs few system calls and few wake-ups.
_INTERVAL_SECONDS: Final = 0.002


class CellOutput(io.TextIOWrapper):
    """A text stream on a raw stream. Lone surrogates are escaped, so printing never fails."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(io.BufferedWriter(raw, 64 * 1024), encoding="utf-8", errors="backslashreplace", newline="\n")
        self._writes = 0
        self._flushed = 0.0

    def write(self, text: str) -> int:
        """Write text; see the module."""
        count = super().write(text)
        self._writes += 1
        now = time.monotonic()
        if self._writes <= _WRITTEN_THROUGH or now - self._flushed >= _INTERVAL_SECONDS:
            self.flush()
            self._flushed = now
        return count

    def begin_cell(self) -> None:
        """Write through again."""
        self._writes = 0
