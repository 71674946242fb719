"""Trials of the kernel's other mechanisms: filters, handles, limits, memory files; and of two that come on top where the machine has them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import re
import resource
import select
import signal
import socket
import struct
from pathlib import Path
from typing import Final

from ..backends.jail.cgroups import SessionGroup, hierarchy
from ..confine import _syscalls_unsafe as raw
from ..confine import seccomp
from ..limits import Limits
from ..runners import mapped_text
from .trials import Refused

__all__ = (
    "cgroups", "kernel_version", "landlock", "mapped_texts", "memory_files", "memory_limits", "pidfds",
    "seccomp_filter", "seccomp_notifications",
)  # fmt: skip

_MB: Final = 1024 * 1024
_LEAST_KERNEL: Final = (5, 14)
# <linux/seccomp.h>: struct seccomp_notif, struct seccomp_notif_resp, and their ioctls.
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
_RESPONSE: Final = struct.Struct("=QqiI")
_NOTIF_RECV: Final = 0xC0502100
_NOTIF_SEND: Final = 0xC0182101


def kernel_version() -> str:
    """Linux from 5.14 on x86-64. The one thing that is read and not tried: it decides which system calls there are."""
    machine, release = platform.machine(), platform.release()
    if machine != "x86_64":
        raise Refused(f"this is {machine}, and the system-call filter knows x86_64 only")
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < _LEAST_KERNEL:
        raise Refused(f"Linux {release} is older than 5.14")
    return f"Linux {found[0]} on {machine}"


def seccomp_filter() -> str:
    """The supervisor's filter, whole: a system call that is not on it fails."""
    raw.prctl(raw.PR_SET_NO_NEW_PRIVS, 1)
    raw.install_filter(seccomp.build_filter(seccomp.SUPERVISOR), listener=False)
    try:
        socket.socket().close()
    except PermissionError:
        return "the filter is in force: socket() is refused"
    raise Refused("the filter was accepted and lets socket() through")


def seccomp_notifications() -> str:
    """The worker's filter, whole: it asks, and what the supervisor answers happens."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            raw.prctl(raw.PR_SET_NO_NEW_PRIVS, 1)
            listener = raw.install_filter(seccomp.build_filter(seccomp.WORKER), listener=True)
            socket.send_fds(theirs, [b"L"], [listener])
            os.kill(os.getppid(), 0)
        except PermissionError:
            os._exit(3)
        finally:
            os._exit(1)
    theirs.close()
    mine.settimeout(2.0)
    _, fds, _, _ = socket.recv_fds(mine, 16, 1)
    if not fds:
        raise Refused("the kernel gives no listener")
    if not select.select(fds, [], [], 2.0)[0]:
        raise Refused("a system call that should ask does not")
    question = bytearray(_NOTIFICATION.size)
    fcntl.ioctl(fds[0], _NOTIF_RECV, question)
    identity = _NOTIFICATION.unpack(question)[0]
    fcntl.ioctl(fds[0], _NOTIF_SEND, bytearray(_RESPONSE.pack(identity, 0, -errno.EPERM, 0)))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 3:
        raise Refused("what the supervisor answers does not happen")
    return "a system call asked, was refused, and failed"


def pidfds() -> str:
    """A signal by handle, and the handle says that the process ended."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    handle = os.pidfd_open(child)
    raw.pidfd_send_signal(handle, signal.SIGKILL)
    if not select.select([handle], [], [], 2.0)[0]:
        raise Refused("the handle does not say that the process ended")
    os.waitpid(child, 0)
    return "a process was killed by its handle"


def memory_limits() -> str:
    """RLIMIT_DATA and RLIMIT_AS, each by itself."""
    pages = [int(field) * resource.getpagesize() for field in Path("/proc/self/statm").read_text().split()]
    for which, used, name, protection in (
        (resource.RLIMIT_DATA, pages[5], "RLIMIT_DATA", mmap.PROT_READ | mmap.PROT_WRITE),
        (resource.RLIMIT_AS, pages[0], "RLIMIT_AS", mmap.PROT_READ),
    ):
        soft = resource.getrlimit(which)
        resource.setrlimit(which, (used + 32 * _MB, soft[1]))
        try:
            mmap.mmap(-1, 128 * _MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection).close()
        except OSError as exc:
            if exc.errno != errno.ENOMEM:
                raise
        else:
            raise Refused(f"{name} is accepted and not enforced")
        finally:
            resource.setrlimit(which, soft)
    return "a mapping over the limit was refused"


def memory_files() -> str:
    """A sealed memory file can be read and mapped, and no longer be written."""
    fd = os.memfd_create("rlm-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"text")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    try:
        os.write(fd, b"x")
    except PermissionError:
        with mmap.mmap(fd, 4, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as text:
            if text[:] == b"text":
                return "a sealed memory file was mapped, and refused a write"
        raise Refused("a memory file shows something else than was written") from None
    raise Refused("a sealed memory file can be written to")


def mapped_texts() -> str:
    """This interpreter takes a mapped text for a string."""
    if not mapped_text.self_test():
        raise Refused("this interpreter keeps its strings in another layout")
    return "a mapped text is a str like any other"


def landlock() -> str:
    """The version in force, and that a rule set without rules takes away what it handles."""
    version = raw.landlock_abi()
    raw.prctl(raw.PR_SET_NO_NEW_PRIVS, 1)
    ruleset = raw.landlock_ruleset(1 << 1)  # LANDLOCK_ACCESS_FS_WRITE_FILE
    raw.landlock_restrict(ruleset)
    try:
        os.close(os.open("/dev/null", os.O_WRONLY))
    except PermissionError:
        return f"version {version} is in force"
    raise Refused("a rule set was accepted and is not in force")


def cgroups() -> str:
    """Groups of our own, with bounds on memory and tasks."""
    found = hierarchy()
    missing = [name for name in ("memory", "pids") if name not in found.places]
    if missing:
        raise Refused(f"this user can make no group for {' and '.join(missing)}")
    SessionGroup(Limits(memory_mb=64), recovery=False, cpus=None).close()
    return f"version {2 if found.unified else 1}: {', '.join(found.places)}"
