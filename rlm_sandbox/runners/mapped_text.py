"""A real ``str`` or ``bytes`` over a memory file, made in constant time. The only file that builds an object by hand.

A compact CPython string is one block of memory: a header, then the characters at 1, 2 or 4 bytes each, then a NUL
character. The characters of a context are in a sealed file that every session maps, so only the header is ours: it is
written to the end of a private page that lies directly in front of the mapped ones.

    | private page, read-write                 | pages of the file, private, read-only    |
    |                          ... zero ... | header | characters ......... NUL ... NUL |
                                            ^ the str object

The header (``Include/cpython/unicodeobject.h``; all words are 8 bytes on the 64-bit machines this is for):

    offset  3.11                   3.12, 3.13
     0      ob_refcnt              ob_refcnt          \\
     8      ob_type                ob_type             |
    16      length                 length              | PyASCIIObject
    24      hash (-1: unknown)     hash                |
    32      state bits             state bits          |
    40      wstr                                      /
    48/40   utf8_length            utf8_length        \\
    56/48   utf8                   utf8                | PyCompactUnicodeObject: for texts that are not ASCII only
    64      wstr_length                               /

A ``bytes`` is simpler: ob_refcnt, ob_type, length and hash, the same in all versions, then its bytes and a NUL.

Nothing here knows the state bits or a version: the header is copied from a string of the same kind that the
interpreter has just made (so it is neither interned nor static), and the words that describe that sample are rewritten
to describe the file. `self_test` then says whether the interpreter takes the result for a string.

The object must never be freed or resized, since it is no block of the allocator: `_REFERENCES` too many references,
which nobody gives back, keep ``del P`` and ``P += 'x'`` from doing either. Its memory is never unmapped.

Standard library only. After import nothing is loaded and only fstat, pread, mmap, mprotect and munmap are called.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

from ..context.stored import CODECS, decode_stored, store_text, stored_bytes

__all__ = (
    "UnknownLayout", "begin_self_test", "end_self_test", "load_bytes", "load_text", "map_bytes", "map_text", "self_test",
)  # fmt: skip

_PAGE: Final = mmap.PAGESIZE
_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10  # <asm-generic/mman-common.h>; Python's mmap module does not have it
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_WORD: Final = 8
_REFCOUNT_AT: Final = 0
_LENGTH_AT: Final = 16
_HASH_AT: Final = 24
#: After the state bits, the last word that is the same in all versions.
_VARIABLE_AT: Final = 40
#: More than a guest can give back, and below 2**31, where 3.12 and later see an immortal object.
_REFERENCES: Final = 1 << 28
#: Long enough not to be one of the interpreter's shared strings, and a number no pointer has.
_SAMPLE_CHARS: Final = 37

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

#: Every text and every ``bytes`` mapped so far, held for good.
_mapped: Final[list[Any]] = []


class UnknownLayout(RuntimeError):
    """This interpreter does not keep its strings in the layout above. Read the text in the ordinary way."""


def load_text(fd: int, chars: int, width: int, ascii_only: bool, *, mapped: bool) -> str:
    """The text of a memory file: in place if ``mapped`` (what `self_test` said), read and decoded otherwise.

    The caller closes ``fd``; a mapped text does not need it any more.

    Raises:
        OSError: the file cannot be read or mapped (memory limits, say).
        ValueError: the file is shorter than its text, or ``width`` is not 1, 2 or 4.
    """
    if mapped:
        return map_text(fd, chars, width, ascii_only)
    _check_size(fd, chars, width)
    data = bytearray()
    while len(data) < chars * width:
        piece = os.pread(fd, min(chars * width - len(data), 1 << 24), len(data))
        if not piece:
            raise ValueError("the memory file is shorter than its text")
        data += piece
    return decode_stored(data, width)


def map_text(fd: int, chars: int, width: int, ascii_only: bool) -> str:
    """A ``str`` whose characters are the pages of a memory file, in constant time and at the cost of one page.

    ``width`` must be that of the text's widest character, as `store_text` writes it: a wider file would make a string
    that is unequal to itself.

    Raises:
        OSError: the mapping failed.
        ValueError: the file is shorter than its text, or ``width`` is not 1, 2 or 4.
        UnknownLayout: see the class; `self_test` finds it out beforehand.
    """
    _check_size(fd, chars, width)
    if chars == 0:
        return ""  # CPython has one empty string only
    text: str = _over_file(fd, stored_bytes(chars, width), lambda data: _header(chars, width, ascii_only, data=data))
    return text


def load_bytes(fd: int, size: int, *, mapped: bool) -> bytes:
    """The first ``size`` bytes of a memory file: in place if ``mapped``, read otherwise. See `load_text`."""
    if mapped:
        return map_bytes(fd, size)
    _check_size(fd, size, 1)
    data = bytearray()
    while len(data) < size:
        piece = os.pread(fd, min(size - len(data), 1 << 24), len(data))
        if not piece:
            raise ValueError("the memory file is shorter than its data")
        data += piece
    return bytes(data)


def map_bytes(fd: int, size: int) -> bytes:
    """A ``bytes`` whose content is the pages of a memory file. See `map_text`."""
    _check_size(fd, size, 1)
    if size < 2:
        return os.pread(fd, size, 0)  # CPython has one of each
    data: bytes = _over_file(fd, stored_bytes(size, 1), lambda _: _bytes_header(size))
    return data


def _over_file(fd: int, body: int, make_header: Callable[[int], bytes]) -> Any:
    """The object whose header ``make_header`` gives for the address where the pages of the file begin."""
    # Reserved without access first, so that the file's pages can replace a range that is certainly ours.
    base = _map(None, _PAGE + body, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    try:
        header = make_header(base + _PAGE)
        if _libc.mprotect(base, _PAGE, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
            raise OSError(ctypes.get_errno(), "cannot make the page of a text's header writable")
        _map(base + _PAGE, body, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, fd)
    except BaseException:
        _libc.munmap(base, _PAGE + body)
        raise
    address = base + _PAGE - len(header)
    ctypes.memmove(address, header, len(header))
    made = ctypes.cast(address, ctypes.py_object).value
    _mapped.append(made)
    return made


def _check_size(fd: int, chars: int, width: int) -> None:
    if width not in CODECS:
        raise ValueError(f"a character takes 1, 2 or 4 bytes, not {width}")
    # Reading mapped pages beyond the end of a file is a SIGBUS, not an exception.
    if chars < 0 or os.fstat(fd).st_size < stored_bytes(chars, width):
        raise ValueError("the memory file is shorter than its text")


def _map(address: int | None, length: int, protection: int, flags: int, fd: int) -> int:
    mapped: int | None = _libc.mmap(address, length, protection, flags, fd, 0)
    if mapped is None or mapped == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "cannot map a text")
    return mapped


def _header(chars: int, width: int, ascii_only: bool, *, data: int) -> bytes:
    """The header of a string of ``chars`` characters whose first is at address ``data``."""
    widest = "\x7f" if ascii_only else {1: "\xff", 2: "\uffff", 4: "\U0010ffff"}[width]
    sample = "".join([widest] * _SAMPLE_CHARS)
    size = sys.getsizeof(sample) - (_SAMPLE_CHARS + 1) * width
    header = bytearray(ctypes.string_at(id(sample), size))
    # Free-threaded and debug builds have other object headers, other implementations no such object at all.
    known = sys.implementation.name == "cpython" and struct.calcsize("P") == _WORD and object.__basicsize__ == _LENGTH_AT
    if not known or size % _WORD or size < _VARIABLE_AT or struct.unpack_from("n", header, _LENGTH_AT) != (_SAMPLE_CHARS,):
        raise UnknownLayout("this interpreter's strings have an unknown layout; read the text in the ordinary way")
    struct.pack_into("n", header, _REFCOUNT_AT, _REFERENCES)
    struct.pack_into("n", header, _LENGTH_AT, chars)
    struct.pack_into("n", header, _HASH_AT, -1)
    # 3.11 points wstr at the characters where a wchar_t has their width; else these words are caches, empty at first.
    described = {id(sample) + size: data, _SAMPLE_CHARS: chars}
    for at in range(_VARIABLE_AT, size, _WORD):
        (word,) = struct.unpack_from("N", header, at)
        struct.pack_into("N", header, at, described.get(word, 0))
    return bytes(header)


def _bytes_header(size: int) -> bytes:
    sample = b"\xff" * _SAMPLE_CHARS
    length = bytes.__basicsize__ - 1
    header = bytearray(ctypes.string_at(id(sample), length))
    known = sys.implementation.name == "cpython" and struct.calcsize("P") == _WORD and object.__basicsize__ == _LENGTH_AT
    if not known or length != _HASH_AT + _WORD or struct.unpack_from("n", header, _LENGTH_AT) != (_SAMPLE_CHARS,):
        raise UnknownLayout("this interpreter's bytes have an unknown layout; read them in the ordinary way")
    struct.pack_into("n", header, _REFCOUNT_AT, _REFERENCES)
    struct.pack_into("n", header, _LENGTH_AT, size)
    struct.pack_into("n", header, _HASH_AT, -1)
    return bytes(header)


def begin_self_test() -> int:
    """Run `self_test` in a child; the process id is for `end_self_test`. Raises OSError."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if self_test() else 1)
        finally:
            os._exit(1)
    return pid


def end_self_test(pid: int) -> bool:
    """What the test has found; its child's death, whatever of, is a no."""
    return os.waitpid(pid, 0)[1] == 0


def self_test() -> bool:
    """True if this interpreter takes a mapped text for a string, in all four kinds.

    Where the layout is not what this file expects the interpreter may crash: call it once in a throw-away process, and
    take its death for False. It writes small memory files, so it runs before the process is confined.
    """
    try:
        return all(
            _behaves(("ab c" + widest) * (length // 5 + 1), length)
            for widest, width in (("\x7f", 1), ("\xff", 1), ("\uffff", 2), ("\ud800", 2), ("\U0010ffff", 4))
            # Less than a page; a page exactly, so that the NUL is on the next one; more than a page.
            for length in (5, 47, _PAGE // width, 2 * _PAGE + 5)
        ) and all(_behaves_as_bytes(length) for length in (2, 47, _PAGE, 2 * _PAGE + 5))
    except (OSError, ValueError, UnknownLayout):
        return False


def _behaves(text: str, length: int) -> bool:
    text = text[:length]
    file = store_text(text)
    try:
        mapped: Any = map_text(file.fd, file.chars, file.width, file.ascii_only)
    finally:
        os.close(file.fd)
    grown = mapped
    grown += "x"  # in place, if the interpreter thought nobody else held it
    good = (
        mapped == text
        and text == mapped
        and len(mapped) == length
        and hash(mapped) == hash(text)
        and hash(mapped[1:]) == hash(text[1:])
        and mapped.find(text[-3:]) == text.find(text[-3:])
        and mapped.isascii() == text.isascii()
        and mapped.encode("utf-8", "surrogatepass") == text.encode("utf-8", "surrogatepass")
        and repr(mapped) == repr(text)
        and mapped + mapped == text + text
        and grown == text + "x"
        and {mapped: 1}[text] == 1
    )
    del mapped, grown
    return good and _reads_number(length)


def _behaves_as_bytes(length: int) -> bool:
    data = ("1" * (length - 1) + "\xff").encode("latin-1")
    file = store_text(data.decode("latin-1"))
    try:
        mapped: Any = map_bytes(file.fd, length)
    finally:
        os.close(file.fd)
    grown = mapped
    grown += b"x"
    good = (
        mapped == data
        and len(mapped) == length
        and hash(mapped) == hash(data)
        and mapped[1:] == data[1:]
        and mapped.find(b"\xff") == length - 1
        and bytes(memoryview(mapped)) == data
        and grown == data + b"x"
        and {mapped: 1}[data] == 1
    )
    del mapped, grown
    return good


def _reads_number(length: int) -> bool:
    """C code reads the characters up to the NUL, which must be there at any length."""
    file = store_text("1" * length)
    try:
        return float(map_text(file.fd, file.chars, file.width, file.ascii_only)) == float("1" * length)
    finally:
        os.close(file.fd)
