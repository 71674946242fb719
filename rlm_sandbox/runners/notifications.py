"""Seccomp notifications: system calls of a guest that wait for its supervisor's word."""

from __future__ import annotations

import errno
import fcntl
import signal
import struct
from typing import Final

from ..confine.seccomp import NUMBERS

__all__ = ("read_notification", "respond")

_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
_RESPONSE: Final = struct.Struct("=QqiI")
_NOTIF_RECV: Final = 0xC0502100
_NOTIF_SEND: Final = 0xC0182101
_CONTINUE: Final = 1
_NAMES: Final = {NUMBERS[name]: name for name in ("clone", "fork", "vfork", "kill", "tgkill", "setpgid")}
#: How long a notification that vanished between poll and receive may hold us up.
_RECEIVE_SECONDS: Final = 0.05


def read_notification(listener: int) -> tuple[int, int, str, list[int]] | None:
    """A system call that waits: its id, the calling thread, its name and its arguments. None if its caller is gone."""
    buffer = bytearray(_NOTIFICATION.size)
    # If the caller dies between poll and here, the ioctl would wait for the next notification.
    signal.setitimer(signal.ITIMER_REAL, _RECEIVE_SECONDS, _RECEIVE_SECONDS)
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, buffer, True)
    except OSError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    identity, caller, _flags, number, _arch, _ip, *args = _NOTIFICATION.unpack(buffer)
    return identity, caller, _NAMES.get(number, ""), args


def respond(listener: int, identity: int, allowed: bool) -> None:
    """Let a system call go on, or fail it. Every argument looked at is a register: the kernel goes on with what was judged."""
    response = _RESPONSE.pack(identity, 0, 0 if allowed else -errno.EPERM, _CONTINUE if allowed else 0)
    try:
        fcntl.ioctl(listener, _NOTIF_SEND, bytearray(response), True)
    except OSError:
        pass  # the caller is gone
