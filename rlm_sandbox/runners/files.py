"""Reading a file of the guest for the host, inside the guest: whatever a name leads to, it is the guest's own tree."""

from __future__ import annotations

import os
import stat

__all__ = ("read_part",)


def read_part(path: str, offset: int, size: int) -> bytes:
    """At most ``size`` bytes of a regular file, from ``offset``. Waits for nobody: a pipe without a writer is refused, too.

    Raises:
        OSError: there is no such file, or it is no regular one.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path!r} is not a regular file")
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)
