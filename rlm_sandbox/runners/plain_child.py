"""A worker as a plain child of the host: no launcher, no supervisor, no namespaces. See `confine.plain` for what bounds it.

It ends with its host: Linux kills it then. Elsewhere a thread of its own ends the process when the other end of its leash is closed; if it is
stopped just then, the kernel sends SIGHUP to its group, which has lost its parent; if a call in C holds the interpreter, its time runs out.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import threading
from typing import Final, NoReturn

from ..confine.plain import PlainLimits, confine_plain
from . import worker
from .preloaded import PRELOADED

__all__ = ("READY", "main")

READY: Final = b"R"
#: Modules that the standard library imports by itself when something of it is first used.
_LATE: Final = ("_strptime", "_pydecimal", "encodings.idna", "encodings.latin_1", "encodings.utf_16", "encodings.utf_32",
    "encodings.utf_8_sig", "encodings.cp1252", "encodings.ascii", "importlib.abc", "importlib.util", "stringprep", "subprocess",
    "binascii", "tomllib", "html.entities", "xml", "signal", "warnings")  # fmt: skip
_LEASH_STACK: Final = 64 * 1024


def _end_with(leash: socket.socket) -> None:
    """Wait for the end of the host."""
    try:
        while leash.recv(1):
            pass
    finally:
        os._exit(0)


def main(data_fd: int, leash_fd: int, parent: int, memory_mb: int, cpu_seconds: int) -> NoReturn:
    """Be the worker of a session. Sizes below 0 are unlimited."""
    leash = socket.socket(fileno=leash_fd)
    for name in (*PRELOADED, *_LATE):
        importlib.import_module(name)
    for number in (signal.SIGHUP, signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    worker.prepare()
    threading.stack_size(_LEASH_STACK)
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()
    try:
        confine_plain(PlainLimits(memory_mb if memory_mb >= 0 else None, cpu_seconds if cpu_seconds >= 0 else None, parent))
    except (OSError, ValueError) as exc:
        leash.sendall(f"{getattr(exc, 'strerror', None) or exc}"[:500].encode())
        os._exit(1)
    leash.sendall(READY)
    unused, _ = socket.socketpair()  # a worker asks for a standby there, which nobody orders here
    worker.main(data_fd, unused, 1)
