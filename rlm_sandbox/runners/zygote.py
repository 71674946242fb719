"""The zygote: a warm interpreter inside the tree, pid 1 of its pid namespace, forked once per session.

It was exec'd with an empty environment at a neutral path, so nothing of the host is in its memory, and it never runs
cell code. If it dies, the kernel ends every session below it.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import warnings
from typing import Final

from ..confine import _syscalls_unsafe as raw
from ..confine import seccomp
from ..confine.places import GUEST_PACKAGES
from ..wire import control
from . import worker
from .preloaded import PRELOADED
from .spare import Nursery
from .warm_up import warm_up

__all__ = ("ARENAS", "main", "own_sizes")

#: Two arenas and small stacks, so that 64 threads fit into the address space a session has.
ARENAS: Final = 2


#: After a session was asked for, the next spare is made when nobody has asked for another one for this long: by then the
#: session's own processes need the processor less.
_QUIET_SECONDS: Final = 0.005
#: Read once, when the libraries are loaded. Their threads would count as the session's tasks, and a fork leaves them behind.
_ONE_THREAD: Final = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "POLARS_MAX_THREADS",
)


class _ImportFailed(Exception):
    """A package of the host's cannot be imported here."""


def _import_packages(host: socket.socket, names: list[str], proc: int) -> None:
    """Import the packages that sessions were opened with, each one announced, so that the host can name one that kills us."""
    sys.path.append(GUEST_PACKAGES)
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        for name in names:
            control.send(host, {"op": "importing", "package": name})
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(name)
            except BaseException as exc:
                raise _ImportFailed(f"{type(exc).__name__}: {exc}"[:500]) from exc
            if _threads(proc) > 1:
                raise _ImportFailed("it starts threads when it is imported, which cannot be forked")
    finally:
        os.environ.clear()


def _threads(proc: int) -> int:
    fd = os.open("self/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
    try:
        return len(os.listdir(fd))
    finally:
        os.close(fd)


def own_sizes(proc: int) -> tuple[int, int]:
    """Bytes of data and of address space this process uses: the base that every session starts from."""
    fd = os.open("self/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        lines = os.read(fd, 16_384).decode().splitlines()
    finally:
        os.close(fd)
    sizes = {line.partition(":")[0]: line.split() for line in lines}
    return int(sizes["VmData"][1]) * 1024, int(sizes["VmSize"][1]) * 1024


def _tasks_are_counted() -> bool:
    """Whether RLIMIT_NPROC binds here. The kernel exempts its own uid 0, also in a user namespace that maps only that."""
    pid = os.fork()
    if pid == 0:
        try:
            raw.unshare(raw.CLONE_NEWUSER)
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
            try:
                os.fork()
            except BlockingIOError:
                os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return status == 0


def main(control_fd: int, proc: int, kernel_ids: int) -> int:
    """Serve spawn requests until the host is gone."""
    host = socket.socket(fileno=control_fd)
    os.set_inheritable(control_fd, False)
    os.set_inheritable(proc, False)
    raw.limit_malloc_arenas(ARENAS)
    for name in PRELOADED:
        importlib.import_module(name)
    order = control.receive(host)
    if order is None or order[0]["op"] != "prepare":
        return 1
    if order[0]["imports"]:
        try:
            _import_packages(host, order[0]["imports"], proc)
        except _ImportFailed as exc:
            control.send(host, {"op": "import_failed", "error": str(exc)})
            return 1
    if not _tasks_are_counted():
        control.send(host, {"op": "failed", "error": "it does not count the tasks of root in this user namespace", "errno": 0})
        return 1
    worker.prepare()
    seccomp.supervisor_program()  # every session installs them; building them takes longer than a fork
    seccomp.worker_program()
    warm_up()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors that end are reaped by the kernel
    nursery = Nursery(host, proc, kernel_ids, own_sizes(proc))
    gc.collect()
    gc.freeze()
    control.send(host, {"op": "ready", "python": list(sys.version_info[:3])})
    poll = select.poll()
    poll.register(host, select.POLLIN)
    while True:
        if nursery.is_empty and not poll.poll(_QUIET_SECONDS * 1000):
            try:
                nursery.prepare()
            except OSError:
                poll.poll()  # the next session tries again, and says why it cannot be had
        request = control.receive(host)
        if request is None:
            return 0
        message, fds = request
        try:
            nursery.spawn(message, fds)
        except OSError as exc:
            failure = {"op": "failed", "error": exc.strerror or str(exc), "errno": exc.errno or 0}
            control.send(host, {"number": message["number"], **failure})
        else:
            control.send(host, {"number": message["number"], "op": "spawned"})
        for fd in fds:
            os.close(fd)
