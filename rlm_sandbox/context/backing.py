"""Where the bytes of a stored context are: in a memory file, or, where they are too many for that, in a private file without a name.

Both can be mapped, and nobody can change them once they are sealed: the memory file by its seals, the private file
because no descriptor that writes is left and no path leads to it. Standard library only; bundled into guests.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import Final

__all__ = ("Backing", "memory_budget")

# <linux/memfd.h>, <linux/fcntl.h>. Literal, because Pythons built against an old libc know neither by name.
_MFD_CLOEXEC: Final = 0x1
_MFD_ALLOW_SEALING: Final = 0x2
_F_ADD_SEALS: Final = 1033
_F_SEAL_SEAL: Final = 0x1
_F_SEAL_SHRINK: Final = 0x2
_F_SEAL_GROW: Final = 0x4
_F_SEAL_WRITE: Final = 0x8

#: What a context in memory may take of what is available: the pages of a memory file can only be swapped, never dropped.
_SHARE: Final = 0.5
_UNKNOWN: Final = 1 << 62
#: Where large files of no lasting use go by convention; unlike /tmp it is seldom in memory.
_DIRECTORY: Final = "/var/tmp"  # noqa: S108 - no name is ever given there


def memory_budget() -> int:
    """How many bytes a new context may keep in memory: half of what this machine, or this control group, has available."""
    return int(min(_available_on_machine(), _available_in_group()) * _SHARE)


def _available_on_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return _UNKNOWN


def _available_in_group() -> int:
    """What a container may still take, as it sees its own group."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # not this version, or "max"
            continue
    return _UNKNOWN


class Backing:
    """A growing file without a name. Ends with `seal` or `close`."""

    def __init__(self, expected: int) -> None:
        """
        Args:
            expected: bytes that are likely to be written, to choose the place; more may come, and then it moves.

        Raises:
            OSError: there is no such file to be had.
        """
        self._budget = memory_budget()
        self.in_memory = expected <= self._budget
        self.fd = _memory_file() if self.in_memory else _private_file()
        self._end = 0

    def read(self, size: int, offset: int) -> bytes:
        """Bytes that were written before."""
        return os.pread(self.fd, size, offset)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data``. Raises OSError if there is no room."""
        view = memoryview(data)
        if self.in_memory and offset + len(view) > self._budget:
            self._move_to_disk()
        try:
            while view:
                written = os.pwrite(self.fd, view, offset)
                offset += written
                view = view[written:]
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
                raise
            raise OSError(
                exc.errno,
                f"there is no room to store the context beyond {offset >> 20:,} MiB ({os.strerror(exc.errno)}); free memory, or set "
                "TMPDIR to a directory on a larger disk",
            ) from None
        self._end = max(self._end, offset)

    def _move_to_disk(self) -> None:
        moved = _private_file()
        try:
            offset = 0
            while offset < self._end:
                offset += os.sendfile(moved, self.fd, offset, self._end - offset)
        except BaseException:
            os.close(moved)
            raise
        os.close(self.fd)
        self.fd, self.in_memory = moved, False

    def seal(self, size: int) -> int:
        """Make it ``size`` bytes long and unchangeable. The descriptor, which is the caller's from now on."""
        os.ftruncate(self.fd, size)
        if self.in_memory:
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_WRITE)
            return self.fd
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(self.fd)
        return fd

    def close(self) -> None:
        """Give it up."""
        os.close(self.fd)


def _memory_file() -> int:
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


def _private_file() -> int:
    """A file that has no name from its birth, or, where the file system cannot do that, from just after it."""
    import tempfile  # not in guests, which never come here

    directory = os.environ.get("TMPDIR") or (_DIRECTORY if os.access(_DIRECTORY, os.W_OK) else tempfile.gettempdir())
    try:
        return os.open(directory, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
    fd, path = tempfile.mkstemp(prefix="rlm-context-", dir=directory)
    Path(path).unlink()
    return fd
