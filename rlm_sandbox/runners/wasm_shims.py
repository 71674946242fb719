"""What this guest lacks, said in Python: an exception a cell can handle, instead of a trap that ends the instance.

None of this protects anything: the engine does. It is for the sake of ordinary cells.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, NoReturn

__all__ = ("install",)

_NO_NETWORK = "this sandbox has no network"
_write = os.write


class _Socket(socket.socket):
    """Cannot be made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(_NO_NETWORK)

    def __del__(self) -> None:
        """There is nothing to close."""


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise PermissionError(_NO_NETWORK)


def _write_descriptor(descriptor: int, data: Any, /) -> int:
    """``os.write`` with descriptors 1 and 2 going where ``print`` goes."""
    stream: Any = {1: sys.__stdout__, 2: sys.__stderr__}.get(descriptor)
    if stream is None:
        return _write(descriptor, data)
    stream.flush()
    written: int = stream.buffer.write(data)
    stream.buffer.flush()
    return written


def _kill(pid: int, number: int, /) -> None:
    """``os.kill`` with one process in the world."""
    if pid != os.getpid():
        raise ProcessLookupError("there is no such process")
    if number:
        os._exit(number)


def install() -> None:
    """Put them in place, in the interpreter the component is made from."""
    socket.socket = socket.SocketType = _Socket  # type: ignore[misc]
    for name in ("create_connection", "create_server", "getaddrinfo", "gethostbyname", "socketpair", "fromfd"):
        setattr(socket, name, _refuse)
    os.write = _write_descriptor
    os.kill = _kill
