"""Handles to processes of a session: by pidfd where the kernel has them, else by pid."""

from __future__ import annotations

import os
from typing import Protocol

from ..confine import _syscalls_unsafe as raw

__all__ = ("ByPid", "ByPidfd", "Process")


class Process(Protocol):
    """A process that can be signalled and forgotten."""

    pid: int
    fd: int
    """Readable when the process has ended; -1 where the kernel offers no such descriptor."""

    def signal(self, number: int) -> None:
        """Send a signal. Raises ProcessLookupError if it is gone."""

    def close(self) -> None:
        """Forget it."""


class ByPidfd:
    """A process by its pidfd, which never means another one."""

    def __init__(self, pid: int, fd: int | None = None) -> None:
        """Raises OSError for a process that is gone, and for a thread that does not lead its process."""
        self.pid = pid
        self.fd = os.pidfd_open(pid) if fd is None else fd

    def signal(self, number: int) -> None:
        """See `Process.signal`."""
        raw.pidfd_send_signal(self.fd, number)

    def close(self) -> None:
        """See `Process.close`."""
        os.close(self.fd)


class ByPid:
    """A process by its number, for kernels without pidfds (gVisor): its parent must not have waited for it."""

    fd = -1

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def signal(self, number: int) -> None:
        """See `Process.signal`."""
        os.kill(self.pid, number)

    def close(self) -> None:
        """See `Process.close`."""
