"""Names of files in a guest, and bringing one out in parts: each part is a turn under the session's limits."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import Final

from ..errors import LimitExceeded, ProtocolViolation

__all__ = ("checked_path", "collect")

_ROOT: Final = "/tmp"  # noqa: S108 - the guest's
_MAX_NAME_BYTES: Final = 4_000
#: Small beside any ``memory_mb``: a file may be larger than what its guest has left to read it with.
_PART: Final = 1 << 20


def checked_path(name: str) -> str:
    """The path in the guest of a file below its ``/tmp``.

    Raises:
        TypeError: ``name`` is no text.
        ValueError: it leads elsewhere, or is no path.
    """
    if not isinstance(name, str):
        raise TypeError(f"read_file() takes a file's name as a str, not {type(name).__name__}")
    path = posixpath.normpath(posixpath.join(_ROOT, name))
    if not path.startswith(f"{_ROOT}/") or "\0" in name:
        raise ValueError(f"read_file() reads below {_ROOT}, and {name[:200]!r} is not there")
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the name {name[:200]!r} cannot be sent to the guest") from None
    if size > _MAX_NAME_BYTES:
        raise ValueError(f"the name of a file is at most {_MAX_NAME_BYTES} bytes long")
    return path


def collect(read: Callable[[int, int], object], most: int | None) -> bytes:
    """All parts of a file together.

    Args:
        read: gives the part at an offset, of at most so many bytes; it is the guest's word.
        most: bytes a file may have.

    Raises:
        LimitExceeded: it has more.
        ProtocolViolation: a part is not what was asked for.
    """
    whole = bytearray()
    while True:
        wanted = _PART if most is None else min(_PART, most - len(whole) + 1)
        part = read(len(whole), wanted)
        if type(part) is not bytes or len(part) > wanted:
            raise ProtocolViolation("the guest's answer is no part of a file")
        whole += part
        if most is not None and len(whole) > most:
            raise LimitExceeded("value_bytes", most)
        if not part:
            return bytes(whole)
