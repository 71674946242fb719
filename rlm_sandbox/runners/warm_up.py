"""What the zygote does before its first fork so that sessions write to fewer of the pages they share with it.

Each page that a session writes to is copied for it: a fault while it starts, and memory that is its own. Much of what the
interpreter writes is bookkeeping that settles after a function has run a few times: counters of calls, specialised
instructions and their caches, versions of types and dicts, the cache of methods. So the paths every session takes are run
here, on channels of our own, until they have settled.
"""

from __future__ import annotations

import io
import linecache
import os
import socket
import sys
from contextlib import suppress
from typing import Any, Final

from ..wire import control
from ..wire.frames import dump_frame
from ..wire.messages import BindObject, Configure, Exec, Get, Message, Names, Resume, SetValue, dump_message
from .branches import BIRTH_FD, Branch
from .output import CellOutput
from .worker import Worker

__all__ = ("warm_up",)

#: CPython specialises a function after 8 calls, and an instruction after a few more.
_ROUNDS: Final = 24
_FUNCTION: Final = BindObject("f", 1, "function", "function", [], [], [])
_kept: Final[list[Worker]] = []
_CELL: Final = "import os\nx = 1\nprint(x)\nx"


def _frame(*messages: Message) -> bytes:
    return b"".join(part for message in messages for part in dump_frame(dump_message(message), [], max_bytes=1 << 20))


def _requests() -> list[bytes]:
    """Each is one turn of a session's usual ones."""
    return [
        _frame(Configure(65_536, 1 << 26, "")),
        _frame(_FUNCTION),
        _frame(SetValue("y", 1)),
        _frame(Exec(1, "x = 1", [], 65_536)),
        _frame(Exec(1, _CELL, ["x"], 65_536)),
        _frame(Exec(1, "1 / 0", [], 65_536)),
        _frame(Exec(1, "z = f(1)", [], 65_536), Resume([[1, 1, None]])),
        _frame(Get("x")),
        _frame(Names()),
    ]


def _worker() -> None:
    """Serve requests as a worker does, with nobody's names."""
    streams: tuple[Any, ...] = sys.stdout, sys.stderr, sys.modules["__main__"]
    host, guest = socket.socketpair()
    birth, other = socket.socketpair()
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        outputs = (CellOutput(io.FileIO(null, "w", closefd=False)), CellOutput(io.FileIO(null, "w", closefd=False)))
        sys.stdout, sys.stderr = outputs
        worker = Worker(os.dup(guest.fileno()), birth, 1, outputs, None)
        # For good: freeing its reserve of 1 MiB would have the allocator take those of sessions from the heap, and clear them.
        _kept.append(worker)
        requests = _requests()
        for _ in range(_ROUNDS):
            for request in requests:
                host.sendall(request)
                worker.serve_one()
                host.recv(1 << 16)
        worker.end()
    finally:
        linecache.clearcache()  # of these cells
        sys.stdout, sys.stderr, sys.modules["__main__"] = streams
        os.close(null)
        for sock in (host, guest, birth, other):
            sock.close()


def _supervisor() -> None:
    """Obey orders as a supervisor does, with no worker."""
    host, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with host:
        branch = Branch(ours, None)
        for _ in range(_ROUNDS):
            control.send(host, {"op": "clock", "seconds": None})
        host.shutdown(socket.SHUT_WR)
        branch.serve()
    with suppress(OSError):
        os.close(BIRTH_FD)


def warm_up() -> None:
    """Run what sessions run. Leaves no descriptor, name or process behind."""
    sys._clear_type_cache()  # what is looked up from now on takes its places, and nobody else's names are let go of later
    for part in (_supervisor, _worker):
        with suppress(OSError):  # short of descriptors, say: nothing depends on this
            part()
