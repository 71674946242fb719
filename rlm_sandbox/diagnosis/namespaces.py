"""Trials of the kernel's namespaces and mounts, in the order and under the ids in which the jail uses them."""

from __future__ import annotations

import errno
import os
import resource
import socket
from typing import Final

from ..confine import _syscalls_unsafe as raw
from .trials import Refused

__all__ = (
    "id_maps", "ipc_namespace", "mount_namespace", "net_namespace", "pid_namespace", "pivot_root", "read_only_tree",
    "session_namespace", "task_limit", "tmpfs_quota", "user_namespace", "uts_namespace",
)  # fmt: skip

#: The id the jail's processes take where the host is root; any that nobody has will do for a trial.
_KERNEL_ID: Final = 0x7FFF0000
_BLOCK: Final = 0x10000
_MB: Final = 1024 * 1024
#: A directory that exists everywhere; in a mount namespace of our own it is only a place.
_PLACE: Final = "/tmp"  # noqa: S108


def _is_real_root() -> bool:
    with open("/proc/self/uid_map") as file:  # noqa: PTH123
        return os.geteuid() == 0 and file.read().split() == ["0", "0", "4294967295"]


def _become_launcher() -> int | None:
    """Take the id that a root host's launcher has. Returns it, or None where the host's own id stays."""
    if not _is_real_root():
        return None
    os.setgroups([])
    os.setresgid(_KERNEL_ID, _KERNEL_ID, _KERNEL_ID)
    os.setresuid(_KERNEL_ID, _KERNEL_ID, _KERNEL_ID)
    raw.prctl(raw.PR_SET_DUMPABLE, 1)
    return _KERNEL_ID


def _write_maps(pid: int, uid: int, gid: int, count: int) -> None:
    files = [("uid_map", f"0 {uid} {count}"), ("gid_map", f"0 {gid} {count}")]
    if count == 1:
        files.insert(0, ("setgroups", "deny"))
    for name, text in files:
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _enter(flags: int = 0) -> None:
    """A user namespace with its id maps, and the namespaces of ``flags`` in it: what the launcher does.

    The maps are written by a process that stays outside and keeps the host's rights, as there.
    """
    me, uid, gid = os.getpid(), os.geteuid(), os.getegid()
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    root = _is_real_root()
    mapper = os.fork()
    if mapper == 0:
        number = errno.EIO
        try:
            os.close(ready_write)
            if os.read(ready_read, 1):
                _write_maps(me, _KERNEL_ID if root else uid, _KERNEL_ID if root else gid, _BLOCK if root else 1)
                number = 0
        except OSError as exc:
            number = exc.errno or errno.EIO
        finally:
            os.write(done_write, number.to_bytes(4, "little"))
            os._exit(0)
    _become_launcher()
    raw.unshare(raw.CLONE_NEWUSER | flags)
    raw.prctl(raw.PR_SET_DUMPABLE, 1)
    os.write(ready_write, b"x")
    number = int.from_bytes(os.read(done_read, 4), "little")
    os.waitpid(mapper, 0)
    if number:
        raise OSError(number, f"writing the id maps: {os.strerror(number)}")


def _own(kind: str, flag: int) -> None:
    """Enter a namespace of ``kind`` and see that it is another one."""
    before = os.readlink(f"/proc/self/ns/{kind}")  # noqa: PTH115
    _enter(flag)
    if os.readlink(f"/proc/self/ns/{kind}") == before:  # noqa: PTH115
        raise Refused("unshare succeeded, but the namespace is the host's")


def user_namespace() -> str:
    """unshare(CLONE_NEWUSER), nothing else."""
    _become_launcher()
    try:
        raw.unshare(raw.CLONE_NEWUSER)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:  # "No space left on device" says it badly
            raise OSError(errno.ENOSPC, "unshare: no more user namespaces are allowed") from None
        raise
    return "unshare made one"


def id_maps() -> str:
    """The maps are written, and the ids in them can be taken."""
    root = _is_real_root()
    _enter()
    if os.getuid() != 0 or os.getgid() != 0:
        raise Refused("the maps were written and are not in force")
    if not root:
        return "one id: sessions run as your own user, inside their namespaces"
    os.setresuid(5, 5, 5)
    return "a block of ids: every session runs as a user of its own, that owns nothing"


def pid_namespace() -> str:
    """The first child is process 1, and sees nobody else."""
    _enter(raw.CLONE_NEWPID)
    child = os.fork()
    if child == 0:
        os._exit(0 if os.getpid() == 1 and os.getppid() == 0 else 1)
    if os.waitpid(child, 0)[1]:
        raise Refused("unshare succeeded, but its first process is not process 1")
    return "its first process is process 1"


def net_namespace() -> str:
    """No interface of the host is in it."""
    host = {name for _, name in socket.if_nameindex()} - {"lo"}
    _own("net", raw.CLONE_NEWNET)
    seen = {name for _, name in socket.if_nameindex()}
    if "lo" not in seen or (host and host <= seen):
        raise Refused("unshare succeeded, but the host's interfaces are in it")
    return "no interface of the host in it"


def ipc_namespace() -> str:
    """It is another one."""
    _own("ipc", raw.CLONE_NEWIPC)
    return "unshare made one"


def uts_namespace() -> str:
    """The host name can be set in it."""
    _own("uts", raw.CLONE_NEWUTS)
    raw.set_hostname("sandbox")
    if os.uname().nodename != "sandbox":
        raise Refused("the host name was set and is not in force")
    return "a host name of its own"


def _private_tmpfs(options: str) -> None:
    raw.mount("none", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    raw.mount("tmpfs", _PLACE, "tmpfs", raw.MS_NOSUID | raw.MS_NODEV, options)


def mount_namespace() -> str:
    """A tmpfs can be mounted and used in it."""
    _own("mnt", raw.CLONE_NEWNS)
    _private_tmpfs("size=1m,mode=0755")
    _write(f"{_PLACE}/x", b"x")
    return "a private tmpfs could be mounted"


def _write(path: str, data: bytes) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)


def tmpfs_quota() -> str:
    """A tmpfs of 1 MiB takes no more."""
    _enter(raw.CLONE_NEWNS)
    _private_tmpfs("size=1m,nr_inodes=16,mode=0700")
    try:
        written = _write(f"{_PLACE}/a", bytes(2 * _MB))
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        written = 0
    if written > _MB:
        raise Refused("a tmpfs of 1 MiB took more")
    try:
        for number in range(64):
            _write(f"{_PLACE}/{number}", b"")
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            return "a tmpfs of 1 MiB and 16 files takes no more"
        raise
    raise Refused("a tmpfs of 16 files took more")


def pivot_root() -> str:
    """The host's tree can be left behind."""
    _enter(raw.CLONE_NEWNS)
    _private_tmpfs("size=1m,mode=0755")
    os.mkdir(f"{_PLACE}/only")  # noqa: PTH102
    os.chdir(_PLACE)
    raw.pivot_root(".", ".")
    raw.umount(".", raw.MNT_DETACH)
    os.chdir("/")
    if [entry.name for entry in os.scandir("/")] != ["only"]:
        raise Refused("pivot_root succeeded, but the host's tree is still there")
    return "the host's tree was left behind"


def read_only_tree() -> str:
    """mount_setattr makes a tree read-only for good."""
    _enter(raw.CLONE_NEWNS)
    _private_tmpfs("size=1m,mode=0755")
    raw.make_read_only(_PLACE, recursive=True)
    try:
        _write(f"{_PLACE}/x", b"x")
    except OSError as exc:
        if exc.errno == errno.EROFS:
            return "mount_setattr made a tree read-only"
        raise
    raise Refused("mount_setattr succeeded, but the tree can be written to")


def session_namespace() -> str:
    """A second layer inside the first: each session has one inside the launcher's."""
    _enter(raw.CLONE_NEWNS)
    raw.unshare(raw.CLONE_NEWUSER | raw.CLONE_NEWNS | raw.CLONE_NEWIPC | raw.CLONE_NEWUTS | raw.CLONE_NEWNET)
    return "namespaces inside namespaces"


def task_limit() -> str:
    """RLIMIT_NPROC counts the tasks of a namespace, not those of its user: since Linux 5.14."""
    _enter()
    # This process is in the namespace, so a limit of three leaves two; a user with more processes elsewhere has them too.
    resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
    made: list[int] = []
    try:
        while len(made) < 8:
            child = os.fork()
            if child == 0:
                os.read(os.pipe()[0], 1)  # until the trial is over
                os._exit(0)
            made.append(child)
    except BlockingIOError:
        pass
    if len(made) >= 8:
        raise Refused("a namespace limited to 3 tasks started more")
    if not made:
        raise Refused("the limit counts the tasks of your user outside the namespace, too")
    return f"a namespace limited to 3 tasks held {len(made) + 1}"
