"""What a session of the jail is spoken to by: sockets, pipes, and whether this process has descriptors for them."""

from __future__ import annotations

import os
import socket
from typing import Final

from ...bridge.guest import GuestLost
from ...errors import BackendUnavailable

__all__ = ("MORE_DESCRIPTORS", "channels", "check_descriptors", "pipes")

MORE_DESCRIPTORS: Final = "close sessions, or raise the limit: ulimit -n"
#: Descriptors that a session's start needs beside its channels: two processes, a look into /proc, and its cgroups' entrances.
_TO_COME: Final = 7


def check_descriptors(count: int) -> None:
    """Raises `GuestLost` if this process cannot have ``count`` more of them: half of what is wanted would be of no use."""
    found: list[int] = []
    try:
        found += os.pipe()
        while len(found) < count:
            found.append(os.dup(found[0]))
    except OSError as exc:
        raise GuestLost(f"this process has too few descriptors ({exc.strerror}); {MORE_DESCRIPTORS}") from None
    finally:
        for fd in found:
            os.close(fd)


def pipes(count: int) -> list[int]:
    """Both ends of each. Raises OSError and leaves none."""
    found: list[int] = []
    try:
        for _ in range(count):
            found += os.pipe()
    except OSError:
        for fd in found:
            os.close(fd)
        raise
    return found


def channels() -> tuple[list[socket.socket], list[int]]:
    """Both ends of the data and the control channel, and of two output pipes."""
    sockets: list[socket.socket] = []
    ends: list[int] = []
    try:
        for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            sockets += socket.socketpair(socket.AF_UNIX, kind)
        ends = pipes(2)
        check_descriptors(_TO_COME)
    except (OSError, GuestLost) as exc:
        for sock in sockets:
            sock.close()
        for fd in ends:
            os.close(fd)
        why = exc.strerror if isinstance(exc, OSError) else "too few are left for a session"
        raise BackendUnavailable("jail", f"this process cannot open a channel ({why})", MORE_DESCRIPTORS) from None
    return sockets, ends
