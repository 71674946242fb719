"""Handles to processes of a session: by pidfd where the kernel has them, else by pid."""

from __future__ import annotations

import os
import signal
import time
from typing import Final, Protocol

from ..confine import _syscalls_unsafe as raw

__all__ = ("ByPid", "ByPidfd", "Process")


#: gVisor loses a SIGCONT that comes while a SIGSTOP takes effect, and the process then stays stopped. So who stops waits until it
#: has. One that is not stopped by then (the machine hardly runs) goes on; at worst its next turn costs it its worker.
_STOP_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.000_2


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
        """See `Process.signal`. After SIGSTOP it returns when every thread has stopped."""
        os.kill(self.pid, number)
        if number == signal.SIGSTOP:
            until = time.monotonic() + _STOP_SECONDS
            while not _has_stopped(self.pid) and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """See `Process.close`."""


def _has_stopped(pid: int) -> bool:
    """Whether no thread of a process runs any more, as the kernel shows it."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return True  # it has ended
    return all(_state(f"/proc/{pid}/task/{thread}/stat") in (b"T", b"Z", b"X") for thread in threads)


def _state(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(512).rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return b"X"  # it has just ended
