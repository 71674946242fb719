"""The order of confinement of a worker that is a program of its own, such as Monty's: confined first, then executed.

Read `confine_engine` from top to bottom; the first step that fails aborts. The filter stands before the program is
executed, so it allows the execution; what could be executed is only what the tree holds: the program and its loader.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping
from typing import Final

from . import _syscalls_unsafe as raw
from . import seccomp
from .steps import GUEST_ID

__all__ = ("PROGRAM", "confine_engine", "engine_command")

PROGRAM: Final = "/bin/engine"
_LIBRARIES: Final = "/lib"
#: Kernel ids for workers of a root host: a block that no launcher of the jail takes.
_FIRST_KERNEL_ID: Final = 0x7FFF0001
_KERNEL_IDS: Final = 0xFFFE
_OPEN_FILES: Final = 32
_TASKS: Final = 16
_MB: Final = 1 << 20
_ROOT: Final = "/tmp"  # noqa: S108 - any directory that exists everywhere: it is only a mount point in our own namespace


def engine_command(libraries: Mapping[str, str], *args: str) -> list[str]:
    """The command that starts the program inside the tree, by way of its loader, if it has one."""
    loader = next((name for name in libraries if name.startswith(("ld-linux", "ld64", "ld-musl", "ld.so"))), None)
    if loader is None:
        return [PROGRAM, *args]
    return [f"{_LIBRARIES}/{loader}", "--library-path", _LIBRARIES, PROGRAM, *args]


def confine_engine(program: str, libraries: Mapping[str, str], parent: int) -> None:
    """Confine this single-threaded process, whose descriptors 0 and 1 are the channel; the caller then executes.

    Args:
        program: host path of the executable.
        libraries: its shared libraries, file name to host path.
        parent: pid of the host, with whose thread this process ends.

    Raises:
        OSError: a step failed; the caller must end the process.
    """
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    raw.close_all_except({0, 1, 2, proc, null})
    namespaces = raw.CLONE_NEWNS | raw.CLONE_NEWIPC | raw.CLONE_NEWUTS | raw.CLONE_NEWNET
    if _is_real_root():
        # As root, while paths below 0700 directories are still readable.
        raw.unshare(namespaces)
        raw.set_hostname("sandbox")
        _tree(program, libraries)
        os.setgroups([])
        _become_nobody(proc)
    else:
        uid, gid = os.geteuid(), os.getegid()
        raw.unshare(raw.CLONE_NEWUSER | namespaces)
        _map_ids(proc, "self", uid, gid)
        raw.set_hostname("sandbox")
        _tree(program, libraries)
    os.close(proc)
    _resource_limits()
    raw.drop_capabilities()
    raw.prctl(raw.PR_SET_NO_NEW_PRIVS, 1)
    # After the last change of ids, which would clear it. It holds across the execution.
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the host ended first")
    os.dup2(null, 2)
    raw.install_filter(seccomp.build_filter(seccomp.ENGINE), listener=False)


def _is_real_root() -> bool:
    with open("/proc/self/uid_map") as file:
        return os.geteuid() == 0 and file.read().split() == ["0", "0", "4294967295"]


def _become_nobody(proc: int) -> None:
    """Root's way: a user namespace that root owns, so that the host can go on setting limits, with one random kernel id."""
    mapped = _FIRST_KERNEL_ID + int.from_bytes(os.urandom(8), "big") % _KERNEL_IDS
    target = os.getpid()
    entered, enter = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        # Only a process outside the namespace may map an id that is not its creator's.
        try:
            os.close(enter)
            if os.read(entered, 1):
                _map_ids(proc, str(target), mapped, mapped)
                os._exit(0)
        finally:
            os._exit(1)
    os.close(entered)
    raw.unshare(raw.CLONE_NEWUSER)
    raw.prctl(raw.PR_SET_DUMPABLE, 1)
    os.write(enter, b".")
    os.close(enter)
    if os.waitpid(mapper, 0)[1] != 0:
        raise OSError("the id maps could not be written")
    os.setresgid(GUEST_ID, GUEST_ID, GUEST_ID)
    os.setresuid(GUEST_ID, GUEST_ID, GUEST_ID)


def _map_ids(proc: int, process: str, uid: int, gid: int) -> None:
    if process == "self":
        raw.prctl(raw.PR_SET_DUMPABLE, 1)  # the files below belong to the process only while it is dumpable
    for name, text in (("setgroups", "deny"), ("uid_map", f"{GUEST_ID} {uid} 1"), ("gid_map", f"{GUEST_ID} {gid} 1")):
        fd = os.open(f"{process}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _tree(program: str, libraries: Mapping[str, str]) -> None:
    """A read-only root that holds the program and its libraries, and nothing else: no devices, no /proc, no /tmp."""
    raw.mount("none", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    wanted = {f"{_LIBRARIES}/{name}": path for name, path in libraries.items()}
    wanted[PROGRAM] = program
    # The sources may lie below the mount point: reach them through descriptors opened before it is covered.
    sources = {target: os.open(os.path.realpath(path), os.O_PATH | os.O_CLOEXEC) for target, path in wanted.items()}
    raw.mount("tmpfs", _ROOT, "tmpfs", raw.MS_NOSUID | raw.MS_NODEV, "size=64k,nr_inodes=64,mode=0755")
    os.umask(0o022)
    for directory in (_LIBRARIES, os.path.dirname(PROGRAM)):
        os.mkdir(_ROOT + directory)
    for target, fd in sources.items():
        os.close(os.open(_ROOT + target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755))
        raw.mount(f"/proc/self/fd/{fd}", _ROOT + target, "", raw.MS_BIND)
        os.close(fd)
    os.chdir(_ROOT)
    raw.pivot_root(".", ".")
    raw.umount(".", raw.MNT_DETACH)
    os.chdir("/")
    raw.make_read_only("/", recursive=True)


def _resource_limits() -> None:
    """Limits of every worker. The host adds those of the session: memory and CPU time."""
    for which, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, _TASKS),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
        (resource.RLIMIT_NICE, 0),
        (resource.RLIMIT_RTPRIO, 0),
        (resource.RLIMIT_STACK, 8 * _MB),
    ):
        resource.setrlimit(which, (value, value))
