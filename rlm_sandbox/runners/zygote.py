"""The zygote: a warm interpreter inside the tree, pid 1 of its pid namespace, forked once per session.

It was exec'd with an empty environment at a neutral path, so nothing of the host is in its memory, and it never runs
cell code. If it dies, the kernel ends every session below it.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import signal
import socket
import sys
import warnings
from typing import Final

from ..confine import _syscalls_unsafe as raw
from ..confine import landlock, seccomp
from ..confine.places import GUEST_PACKAGES
from ..confine.steps import Input, SessionConfinement, confine_supervisor
from . import control, supervisor, worker
from .branches import Branch
from .preloaded import PRELOADED

__all__ = ("ARENAS", "main", "own_sizes")

#: Two arenas and small stacks, so that 64 threads fit into the address space a session has.
ARENAS: Final = 2


#: Worker's data, supervisor's control, stdout, stderr; then the mounts of input files, then the entrances of its cgroups.
_CHANNELS: Final = 4
#: Read once, when the libraries are loaded. Their threads would count as the session's tasks, and a fork leaves them behind.
_ONE_THREAD: Final = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "POLARS_MAX_THREADS",
)


#: Found out once: every session has it, or none.
_LANDLOCK: Final = landlock.abi()


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


def _limit(message: control.Message, name: str) -> int | None:
    value = message[name]
    return None if value is None else int(value)


def _spawn(message: control.Message, fds: list[int], proc: int, host: socket.socket, own: int, sizes: tuple[int, int]) -> None:
    """Fork the supervisor of one session, in a pid namespace of its own."""
    mounts = fds[_CHANNELS : _CHANNELS + len(message["inputs"])]
    entrances = fds[_CHANNELS + len(mounts) :]
    plan = SessionConfinement(
        kernel_id=_limit(message, "kernel_id"),
        memory_mb=_limit(message, "memory_mb"),
        disk_mb=_limit(message, "disk_mb"),
        tasks=_limit(message, "tasks"),
        base_data=sizes[0],
        base_address_space=sizes[1],
        inputs=tuple(Input(name, directory, fd) for (name, directory), fd in zip(message["inputs"], mounts, strict=True)),
        landlock=_LANDLOCK,
    )
    raw.unshare(raw.CLONE_NEWPID)  # for children only: the next fork is pid 1 of the new namespace
    try:
        pid = os.fork()
    except OSError:
        raw.setns(own, raw.CLONE_NEWPID)
        raise
    if pid == 0:
        try:
            host.close()
            os.close(own)
            keep = {proc, *fds[_CHANNELS:]}

            def make(to_host: socket.socket, seconds: float | None) -> Branch:
                return Branch(to_host, seconds, entrances=tuple(entrances))

            supervisor.main(lambda: confine_supervisor(plan, proc), keep, fds[:_CHANNELS], message["seconds"], make)
        finally:
            os._exit(1)
    raw.setns(own, raw.CLONE_NEWPID)


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors that end are reaped by the kernel
    own = os.pidfd_open(os.getpid())
    sizes = own_sizes(proc)
    gc.collect()
    gc.freeze()
    control.send(host, {"op": "ready", "kernel_ids": kernel_ids, "python": list(sys.version_info[:3])})
    while True:
        request = control.receive(host)
        if request is None:
            return 0
        message, fds = request
        try:
            _spawn(message, fds, proc, host, own, sizes)
        except OSError as exc:
            failure = {"op": "failed", "error": exc.strerror or str(exc), "errno": exc.errno or 0}
            control.send(host, {"number": message["number"], **failure})
        else:
            control.send(host, {"number": message["number"], "op": "spawned"})
        for fd in fds:
            os.close(fd)
