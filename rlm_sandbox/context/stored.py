"""A text in a sealed memory file, as CPython keeps it in memory: every character at the width of the widest one.

So a guest can map the file and use it as the body of a ``str``, and an offset in characters is an offset in bytes.
The file ends with at least one NUL character and is a whole number of pages long. Standard library only; bundled
into guests, whose self-test writes such files too.
"""

from __future__ import annotations

import codecs
import ctypes
import fcntl
import mmap
import os
import sys
from array import array
from dataclasses import dataclass
from typing import Final

__all__ = ("CODECS", "MemoryFile", "decode_stored", "store_text", "stored_bytes")

_ORDER: Final = "le" if sys.byteorder == "little" else "be"
#: Bytes a character to the codec that has this width for every character that fits. The byte order is the machine's,
#: and is named, because a codec that guesses it would swallow a byte-order mark at the start of a text.
CODECS: Final = {1: "latin-1", 2: f"utf-16-{_ORDER}", 4: f"utf-32-{_ORDER}"}
for _codec in CODECS.values():
    codecs.lookup(_codec)  # loads it now: a confined guest cannot import it later

#: Characters encoded at once: the host never holds a second copy of a large text.
_SLICE_CHARS: Final = 1 << 20

# <linux/memfd.h>, <linux/fcntl.h>. Literal, because Pythons built against an old libc know neither by name.
_MFD_CLOEXEC: Final = 0x1
_MFD_ALLOW_SEALING: Final = 0x2
_F_ADD_SEALS: Final = 1033
_F_SEAL_SEAL: Final = 0x1
_F_SEAL_SHRINK: Final = 0x2
_F_SEAL_GROW: Final = 0x4
_F_SEAL_WRITE: Final = 0x8


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A text in a sealed memory file, ready to be mapped.

    ``chars`` is its length in characters, ``width`` the bytes of each (1, 2 or 4). ``ascii_only`` tells the two
    layouts of width 1 apart.
    """

    fd: int
    chars: int
    width: int
    ascii_only: bool


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


def store_text(text: str) -> MemoryFile:
    """Write ``text`` into a new sealed memory file. The caller closes its descriptor.

    Raises:
        OSError: there is no memory for it, or the machine has no memory files.
    """
    fd = _create()
    try:
        width = next(width for width in CODECS if _write(fd, text, width))
        os.ftruncate(fd, stored_bytes(len(text), width))
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_WRITE)
    except BaseException:
        os.close(fd)
        raise
    return MemoryFile(fd, len(text), width, text.isascii())


def _write(fd: int, text: str, width: int) -> bool:
    """Write ``text`` at ``width``; False at the first character that does not fit (the next width overwrites it all)."""
    offset = 0
    for start in range(0, len(text), _SLICE_CHARS):
        piece = text[start : start + _SLICE_CHARS]
        try:
            data = memoryview(piece.encode(CODECS[width], "surrogatepass"))
        except UnicodeEncodeError:  # latin-1
            return False
        if len(data) != len(piece) * width:  # utf-16: a character beyond U+FFFF took two units
            return False
        while data:
            written = os.pwrite(fd, data, offset)
            offset += written
            data = data[written:]
    return True


def _create() -> int:
    name, flags = "rlm-context", _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, flags)
    # A Python built against a libc before 2.27 (conda's, uv's before mid-2026) lacks it; the libc it runs on has it.
    create = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
    if create is None:
        raise OSError("this machine has no memory files (memfd_create); use Linux with glibc 2.27 or newer")
    fd = int(create(name.encode(), ctypes.c_uint(flags)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "cannot create a memory file")
    return fd
