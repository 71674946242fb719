"""Small JSON messages with descriptors over a SOCK_SEQPACKET pair: host to launcher, zygote and supervisor.

The worker never holds such a socket. Both sides still cap and check what they read.
"""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any, Final

__all__ = ("MAX_MESSAGE", "Message", "dump", "load", "receive", "send")

MAX_MESSAGE: Final = 8192
#: Four channels, the most input files a session can have, and the entrances of its cgroups.
_MAX_DESCRIPTORS: Final = 40

Message = dict[str, Any]


def dump(message: Message) -> bytes:
    """A message as bytes. Raises ValueError if it is too long."""
    raw = json.dumps(message).encode()
    if len(raw) > MAX_MESSAGE:
        raise ValueError("a control message is too long")
    return raw


def load(raw: bytes) -> Message:
    """A message from bytes. Raises ValueError if it is malformed."""
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("a control message is malformed") from None
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ValueError("a control message has no op")
    return message


def send(sock: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send one message. Raises OSError if the peer is gone, ValueError if it is too long."""
    raw = dump(message)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([raw], ancillary)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """One message and its descriptors, or None at the end of the stream.

    Raises:
        OSError: the socket failed (also BlockingIOError).
        ValueError: the message is malformed; its descriptors are closed.
    """
    space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
    raw, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds.extend(numbers)
    if not raw and not fds:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("a control message was truncated")
        message = load(raw)
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds
