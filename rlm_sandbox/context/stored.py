"""A text in a sealed file, as CPython keeps it in memory: every character at the width of the widest one.

So a guest can map the file and use it as the body of a ``str``, and an offset in characters is an offset in bytes.
The file ends with at least one NUL character and is a whole number of pages long. Standard library only; bundled
into guests, whose self-test writes such files too.
"""

from __future__ import annotations

import codecs
import mmap
import sys
from array import array
from dataclasses import dataclass
from typing import Final

from .backing import Backing

__all__ = ("CODECS", "MemoryFile", "TextWriter", "decode_stored", "store_text", "stored_bytes")

_ORDER: Final = "le" if sys.byteorder == "little" else "be"
#: Bytes a character to the codec that has this width for every character that fits. The byte order is the machine's,
#: and is named, because a codec that guesses it would swallow a byte-order mark at the start of a text.
CODECS: Final = {1: "latin-1", 2: f"utf-16-{_ORDER}", 4: f"utf-32-{_ORDER}"}
for _codec in CODECS.values():
    codecs.lookup(_codec)  # loads it now: a confined guest cannot import it later

#: Characters encoded at once: the host never holds a second copy of a large text.
_SLICE_CHARS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A text in a sealed file, ready to be mapped.

    ``chars`` is its length in characters, ``width`` the bytes of each (1, 2 or 4). ``ascii_only`` tells the two
    layouts of width 1 apart. ``in_memory`` is False for a private file on disk, which texts beyond the memory get.
    """

    fd: int
    chars: int
    width: int
    ascii_only: bool
    in_memory: bool = True


def stored_bytes(chars: int, width: int) -> int:
    """The length of the file of a text: the text, at least one NUL character, up to a full page."""
    return -(-(chars + 1) * width // mmap.PAGESIZE) * mmap.PAGESIZE


def decode_stored(data: bytes | bytearray, width: int) -> str:
    """The text of the first bytes of a memory file, by copying."""
    text = data.decode(CODECS[width], "surrogatepass")
    if width == 2 and len(text) * width != len(data):
        # Two lone surrogates next to each other came out as one character: only the wider codec keeps them apart.
        return decode_stored(array("I", array("H", bytes(data))).tobytes(), 4)
    return text


class TextWriter:
    """Stores a text that comes in pieces. A character wider than all before it widens what is there, in place."""

    def __init__(self, expected_chars: int) -> None:
        """
        Args:
            expected_chars: about how long the text will be: decides whether it goes to memory at first.

        Raises:
            OSError: there is no file to be had.
        """
        self._backing = Backing(expected_chars)
        self._width = 1
        self._ascii_only = True
        self.chars = 0

    def write(self, text: str) -> None:
        """Add text. Raises OSError if there is no room."""
        for start in range(0, len(text), _SLICE_CHARS):
            piece = text[start : start + _SLICE_CHARS]
            data = _encoded(piece, self._width)
            while data is None:
                self._widen(2 * self._width)
                data = _encoded(piece, self._width)
            self._backing.write(data, self.chars * self._width)
            self.chars += len(piece)
            self._ascii_only = self._ascii_only and piece.isascii()

    def _widen(self, width: int) -> None:
        """From the end, so that nothing is overwritten before it was read."""
        for start in range((self.chars - 1) // _SLICE_CHARS * _SLICE_CHARS, -1, -_SLICE_CHARS) if self.chars else ():
            size = min(_SLICE_CHARS, self.chars - start) * self._width
            piece = decode_stored(self._backing.read(size, start * self._width), self._width)
            self._backing.write(piece.encode(CODECS[width], "surrogatepass"), start * width)
        self._width = width

    def finish(self) -> MemoryFile:
        """Seal what was written. The caller closes its descriptor."""
        fd = self._backing.seal(stored_bytes(self.chars, self._width))
        return MemoryFile(fd, self.chars, self._width, self._ascii_only, self._backing.in_memory)

    def close(self) -> None:
        """Give it up; not after `finish`."""
        self._backing.close()


def store_text(text: str) -> MemoryFile:
    """Write ``text`` into a new sealed file. The caller closes its descriptor.

    Raises:
        OSError: there is no room for it, or the machine has no memory files.
    """
    writer = TextWriter(len(text))
    try:
        writer.write(text)
        return writer.finish()
    except BaseException:
        writer.close()
        raise


def _encoded(piece: str, width: int) -> bytes | None:
    """``piece`` at ``width``; None if a character does not fit."""
    try:
        data = piece.encode(CODECS[width], "surrogatepass")
    except UnicodeEncodeError:  # latin-1
        return None
    return data if len(data) == len(piece) * width else None  # utf-16: a character beyond U+FFFF takes two units
