"""The order of confinement. Each list is read from top to bottom; the first step that fails aborts the session.

The supervisor's steps run in a fresh child of the zygote, the worker's in a fresh child of the supervisor. No step
weakens or skips another, and none has a fallback.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from . import _syscalls_unsafe as raw
from . import landlock, seccomp
from .places import GUEST_INPUT

__all__ = (
    "GUEST_ID",
    "Input",
    "InputUnreadable",
    "SessionConfinement",
    "confine_in_container",
    "confine_in_plain_container",
    "confine_plain_worker",
    "confine_relay",
    "confine_supervisor",
    "confine_worker",
    "enter_namespaces",
    "seal_worker",
)

#: User and group id a guest sees as its own.
GUEST_ID: Final = 1000
#: tmpfs inodes per MiB of disk: an empty file costs kernel memory too.
_INODES_PER_MB: Final = 256
_MAX_DESCRIPTORS: Final = 256
#: Address space beyond memory and contexts: code, stacks, arenas and reservations that hold no data.
_ADDRESS_SPACE_SLACK_MB: Final = 1024
#: The same where the address space is what bounds memory: the stacks of 64 threads, and as much again.
_PLAIN_SLACK_MB: Final = 64
#: Copies of a session below one supervisor, and states they keep: see `runners.branches`.
_MOST_SESSIONS: Final = 8
_MOST_KEPT: Final = 64
_MB: Final = 1024 * 1024


class InputUnreadable(OSError):
    """An input file cannot be read by the id that the session runs as."""

    def __init__(self, name: str, cause: OSError) -> None:
        super().__init__(cause.errno, cause.strerror)
        self.name = name


@dataclass(frozen=True, slots=True)
class Input:
    """A file or directory of the host that a session may read: its name below `GUEST_INPUT`, and its detached mount."""

    name: str
    directory: bool
    mount: int


@dataclass(frozen=True, slots=True)
class SessionConfinement:
    """What the supervisor's steps need to know. Sizes in MiB; None is unlimited.

    ``kernel_id``: the uid and gid, in the zygote's user namespace, that this session runs as; None keeps the zygote's,
    which on an ordinary user's host is that user. ``base_data``, ``base_address_space``: bytes the zygote itself uses.
    ``landlock``: the version of it that is in force; 0 where the kernel has none.
    """

    kernel_id: int | None
    memory_mb: int | None
    disk_mb: int | None
    tasks: int | None
    base_data: int
    base_address_space: int
    inputs: tuple[Input, ...] = ()
    landlock: int = 0


def _own_kernel_id(kernel_id: int | None) -> None:
    if kernel_id is None:
        return
    os.setgroups([])
    os.setresgid(kernel_id, kernel_id, kernel_id)
    os.setresuid(kernel_id, kernel_id, kernel_id)


def _own_namespaces(_kernel_id: int | None) -> None:
    raw.unshare(raw.CLONE_NEWUSER | raw.CLONE_NEWNS | raw.CLONE_NEWIPC | raw.CLONE_NEWUTS | raw.CLONE_NEWNET)


def _map_ids(kernel_id: int | None, proc: int) -> None:
    outer = kernel_id or 0
    raw.prctl(raw.PR_SET_DUMPABLE, 1)  # the files below belong to the process only while it is dumpable
    for name, text in (("setgroups", "deny"), ("uid_map", f"{GUEST_ID} {outer} 1"), ("gid_map", f"{GUEST_ID} {outer} 1")):
        fd = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _private_tmp(plan: SessionConfinement) -> None:
    flags = raw.MS_NOSUID | raw.MS_NODEV | raw.MS_NOEXEC
    if plan.disk_mb == 0:
        raw.mount("tmpfs", "/tmp", "tmpfs", flags | raw.MS_RDONLY, "size=4k,nr_inodes=2")  # noqa: S108
    elif plan.disk_mb is None:
        raw.mount("tmpfs", "/tmp", "tmpfs", flags, "mode=0700")  # noqa: S108
    else:
        inodes = plan.disk_mb * _INODES_PER_MB
        raw.mount("tmpfs", "/tmp", "tmpfs", flags, f"size={plan.disk_mb}m,nr_inodes={inodes},mode=0700")  # noqa: S108
    os.chdir("/tmp")  # noqa: S108


def _inputs(plan: SessionConfinement) -> None:
    if not plan.inputs:
        return
    flags = raw.MS_NOSUID | raw.MS_NODEV | raw.MS_NOEXEC
    raw.mount("tmpfs", GUEST_INPUT, "tmpfs", flags, f"size=64k,nr_inodes={len(plan.inputs) + 1},mode=0755")
    for item in plan.inputs:
        target = f"{GUEST_INPUT}/{item.name}"
        if item.directory:
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        raw.attach_mount(item.mount, target)
        os.close(item.mount)
        try:  # now, and as who the session is: a file of root's own would be found out in the middle of a cell
            os.close(os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as exc:
            raise InputUnreadable(item.name, exc) from None
    raw.make_read_only(GUEST_INPUT, recursive=False)


def _neutral_hostname(_kernel_id: int | None) -> None:
    raw.set_hostname("sandbox")


def _no_privileges(_plan: SessionConfinement) -> None:
    raw.drop_capabilities()
    raw.prctl(raw.PR_SET_NO_NEW_PRIVS, 1)
    raw.prctl(raw.PR_SET_DUMPABLE, 0)


def _resource_limits(plan: SessionConfinement) -> None:
    hard: list[tuple[int, int]] = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 256),
        (resource.RLIMIT_NICE, 0),
        (resource.RLIMIT_RTPRIO, 0),
        (resource.RLIMIT_STACK, 8 * _MB),
    ]
    if plan.disk_mb is not None:
        hard.append((resource.RLIMIT_FSIZE, plan.disk_mb * _MB))
    if plan.memory_mb is not None:
        hard.append((resource.RLIMIT_DATA, plan.base_data + plan.memory_mb * _MB))
    for which, value in hard:
        resource.setrlimit(which, (value, value))
    if plan.tasks is not None:
        # On top come the supervisor, the standby, and the next standby before that one goes. The soft limit is moved by the
        # supervisor for what the host asks it to keep beside them.
        tasks = plan.tasks + 3
        resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks * _MOST_SESSIONS + _MOST_KEPT))
    if plan.memory_mb is not None:
        # The hard limit stays open so that the host, and only the host, can add the size of a mapped context: seccomp
        # refuses a guest every prlimit that sets something.
        soft = plan.base_address_space + (plan.memory_mb + _ADDRESS_SPACE_SLACK_MB) * _MB
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))


def _file_rules(plan: SessionConfinement) -> None:
    if plan.landlock:
        landlock.confine_files(plan.landlock)


def _supervisor_filter(_plan: SessionConfinement) -> None:
    raw.install_filter(seccomp.supervisor_program(), listener=False)


def enter_namespaces(kernel_id: int | None, proc: int) -> None:
    """The first steps of a supervisor, which are the same for every session: into namespaces of its own, as a user of its own.

    Args:
        kernel_id: see `SessionConfinement`.
        proc: a descriptor of a procfs that shows this process, a fresh child of the zygote and pid 1 of its own pid
            namespace; closed before the guest begins.

    Raises:
        OSError: a step failed; the caller must end the process.
    """
    steps: list[Callable[[int | None], None]] = [
        _own_kernel_id,
        _own_namespaces,
        lambda kernel_id: _map_ids(kernel_id, proc),
        lambda _kernel_id: os.close(proc),
        _neutral_hostname,
        _not_dumpable,
    ]
    for step in steps:
        step(kernel_id)


def confine_supervisor(plan: SessionConfinement) -> None:
    """Confine this process, which has done `enter_namespaces`, for the session that it is to supervise.

    Args:
        plan: what to enforce.

    Raises:
        OSError: a step failed; the caller must end the process.
    """
    steps: list[Callable[[SessionConfinement], None]] = [
        _private_tmp,
        _inputs,
        _resource_limits,
        _no_privileges,
        _file_rules,
        _supervisor_filter,
    ]
    for step in steps:
        step(plan)


def _check_container(_plan: SessionConfinement) -> None:
    """The engine was asked for no privileges and an ordinary user; a container that has them was started by somebody else."""
    if os.getuid() == 0 or raw.prctl(raw.PR_GET_NO_NEW_PRIVS) != 1 or raw.prctl(raw.PR_CAPBSET_READ, 0) != 0:
        raise PermissionError("the container runs with privileges that the runner must not have")


def _not_dumpable(_plan: object) -> None:
    raw.prctl(raw.PR_SET_DUMPABLE, 0)  # /proc of this process belongs to root from now on, and so does a worker's


def confine_in_container(plan: SessionConfinement) -> None:
    """Confine this process, pid 1 of a container that is the isolation itself.

    Raises:
        OSError: a step failed; the caller must end the process.
    """
    steps: list[Callable[[SessionConfinement], None]] = [
        _check_container,
        lambda _plan: os.chdir("/tmp"),  # noqa: S108
        _resource_limits,
        _not_dumpable,
        _supervisor_filter,
    ]
    for step in steps:
        step(plan)


def _plain_resource_limits(plan: SessionConfinement) -> None:
    """What such a kernel counts. It does not count data alone, so the address space is what bounds memory."""
    hard: list[tuple[int, int]] = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS),
        (resource.RLIMIT_STACK, 8 * _MB),
    ]
    if plan.disk_mb is not None:
        hard.append((resource.RLIMIT_FSIZE, plan.disk_mb * _MB))
    for which, value in hard:
        resource.setrlimit(which, (value, value))
    if plan.memory_mb is not None:
        soft = plan.base_address_space + (plan.memory_mb + _PLAIN_SLACK_MB) * _MB
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))


def confine_in_plain_container(plan: SessionConfinement) -> None:
    """As `confine_in_container`, on a kernel without seccomp notifications and pidfds: gVisor's.

    Raises:
        OSError: a step failed; the caller must end the process.
    """
    steps: list[Callable[[SessionConfinement], None]] = [
        _check_container,
        lambda _plan: os.chdir("/tmp"),  # noqa: S108
        _plain_resource_limits,
        _not_dumpable,
        _supervisor_filter,
    ]
    for step in steps:
        step(plan)


def confine_relay() -> None:
    """Confine the relay, which carries a guest's bytes but never looks into them.

    Raises:
        OSError: the kernel refuses; the caller must end the process.
    """
    raw.prctl(raw.PR_SET_DUMPABLE, 0)
    raw.install_filter(seccomp.supervisor_program(), listener=False)


def confine_worker() -> int:
    """The worker's own filter. Returns the descriptor of its notifier, for the supervisor.

    Raises:
        OSError: the kernel refuses; the caller must end the process.
    """
    return raw.install_filter(seccomp.worker_program(), listener=True)


def confine_plain_worker(secret: int) -> None:
    """The worker's filter where the kernel has no notifier: a fork needs ``secret``, which the supervisor hands out.

    Raises:
        OSError: the kernel refuses; the caller must end the process.
    """
    program = seccomp.build_filter(seccomp.worker_without_notifier(os.getpid()), fork_secret=secret)
    raw.install_filter(program, listener=False)


def seal_worker() -> None:
    """The last step before cell code, when the notifier has been handed over.

    Raises:
        OSError: the kernel refuses; the caller must end the process.
    """
    raw.install_filter(seccomp.build_refusal(seccomp.LAST), listener=False)
