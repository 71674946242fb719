"""The layers of the ``jail`` backend, in the order in which it builds them, and what follows where one is missing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import kernel, namespaces
from .findings import Finding, Status
from .trials import TrialResult, attempt

__all__ = ("Layer", "examine_layers")

_BACKEND: Final = "jail"
_KERNEL_REMEDY: Final = "update the kernel to 5.14 or newer, or use another backend"
_CONTAINER_REMEDY: Final = (
    "if this is a container, start it with a seccomp profile that allows unshare, mount and pivot_root (docker run --security-opt "
    "seccomp=PROFILE.json), or use another backend"
)


def _namespace_remedy(result: TrialResult) -> str:
    """The switch that refuses namespaces here. Each exists on some distributions only, so the one that is off is named."""
    if result.errno == errno.ENOSPC or _setting("/proc/sys/user/max_user_namespaces") == "0":
        return "run: sysctl user.max_user_namespaces=10000"
    if _setting("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return "run: sysctl kernel.unprivileged_userns_clone=1"
    if _setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return "run: sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    return _CONTAINER_REMEDY


def _setting(path: str) -> str:
    try:
        return Path(path).read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _always(remedy: str) -> Callable[[TrialResult], str]:
    return lambda _result: remedy


@dataclass(frozen=True, slots=True)
class Layer:
    """One mechanism: how it is tried, what it gives, what its absence means.

    ``needs`` names the layers without which it cannot be tried; ``absent`` is what its failure counts as.
    """

    name: str
    trial: Callable[[], str]
    gives: str
    without: str
    remedy: Callable[[TrialResult], str]
    needs: tuple[str, ...] = ()
    absent: Status = Status.FAIL


_USER: Final = ("user namespaces", "id maps")

LAYERS: Final = (
    Layer(
        "kernel", kernel.kernel_version,
        "Every system call that the jail uses is there.",
        "The jail does not start: what it relies on is missing or differs.",
        _always(_KERNEL_REMEDY),
    ),
    Layer(
        "user namespaces", namespaces.user_namespace,
        "Whatever a guest may do in its own namespaces, it has no right outside them.",
        "The jail does not start: no other layer can be built without root's rights, which it never uses in their place.",
        _namespace_remedy,
    ),
    Layer(
        "id maps", namespaces.id_maps,
        "A guest's ids mean nothing on the host.",
        "The jail does not start: its processes would have no ids.",
        _namespace_remedy, needs=_USER[:1],
    ),
    Layer(
        "mount namespace", namespaces.mount_namespace,
        "A guest has a file tree of its own.",
        "The jail does not start: a guest would see the host's files.",
        _namespace_remedy, needs=_USER,
    ),
    Layer(
        "pid namespace", namespaces.pid_namespace,
        "A guest sees only its own processes, and all of them end with their first.",
        "The jail does not start: a guest could signal other processes and outlive its session.",
        _namespace_remedy, needs=_USER,
    ),
    Layer(
        "network namespace", namespaces.net_namespace,
        "A guest has no network.",
        "The jail does not start: a guest could reach the network.",
        _namespace_remedy, needs=_USER,
    ),
    Layer(
        "ipc namespace", namespaces.ipc_namespace,
        "A guest shares no memory and no queue with other processes.",
        "The jail does not start: a guest could reach other processes' shared memory.",
        _namespace_remedy, needs=_USER,
    ),
    Layer(
        "uts namespace", namespaces.uts_namespace,
        "A guest does not learn the host's name.",
        "The jail does not start: a guest would learn the host's name.",
        _namespace_remedy, needs=_USER,
    ),
    Layer(
        "nested namespaces", namespaces.session_namespace,
        "Each session has namespaces of its own inside the jail's.",
        "The jail does not start: sessions could reach each other.",
        _namespace_remedy, needs=_USER,
    ),
    Layer(
        "pivot_root", namespaces.pivot_root,
        "The host's files are not in the guest's tree at all.",
        "The jail does not start: the host's files would stay in reach.",
        _always("start this system from a disk or a container image and not from an initial ramdisk, or use another backend"),
        needs=(*_USER, "mount namespace"),
    ),
    Layer(
        "mount_setattr", namespaces.read_only_tree,
        "A guest can change no file outside its own /tmp.",
        "The jail does not start: a guest could change what other sessions read.",
        _always(_KERNEL_REMEDY), needs=(*_USER, "mount namespace"),
    ),
    Layer(
        "tmpfs quota", namespaces.tmpfs_quota,
        "disk_mb holds: a guest cannot fill the host's memory with files.",
        "The jail does not start: disk_mb would not hold.",
        _always(_KERNEL_REMEDY), needs=(*_USER, "mount namespace"),
    ),
    Layer(
        "Landlock", kernel.landlock,
        "A guest may only do with files what a list of paths allows, whatever is mounted; pipes of an input directory included.",
        "The jail starts without it: file access rests on the guest's own tree and its read-only mounts.",
        _always("enable Landlock (kernel parameter lsm=landlock,... on kernels built with it)"), needs=("kernel",),
        absent=Status.CAUTION,
    ),
    Layer(
        "seccomp filter", kernel.seccomp_filter,
        "A guest reaches only the system calls that a Python needs.",
        "The jail does not start: a guest could use every system call of the kernel.",
        _always(_CONTAINER_REMEDY), needs=("kernel",),
    ),
    Layer(
        "seccomp notification", kernel.seccomp_notifications,
        "A guest can start no process and signal no other: each attempt is decided outside it.",
        "The jail does not start: a guest could fork, and kill its own recovery point.",
        _always(_CONTAINER_REMEDY), needs=("kernel", "seccomp filter"),
    ),
    Layer(
        "pidfds", kernel.pidfds,
        "A kill reaches the process that is meant, even if its number has been given to another.",
        "The jail does not start: it kills by handle only.",
        _always(_KERNEL_REMEDY),
    ),
    Layer(
        "memory limits", kernel.memory_limits,
        "memory_mb holds without a cgroup, for any user.",
        "The jail cannot be relied on here: memory_mb would not hold.",
        _always("use a kernel that enforces RLIMIT_DATA (some container sandboxes do not), or another backend"),
    ),
    Layer(
        "task limit", namespaces.task_limit,
        "processes holds for each session by itself.",
        "The jail cannot be relied on here: a guest could start tasks without end, or none.",
        _always(_KERNEL_REMEDY), needs=_USER,
    ),
    Layer(
        "cgroup", kernel.cgroups,
        "The kernel counts a whole session, its own memory for it included, and its word ends a cell that takes more.",
        "The jail starts without it: limits hold for each process, their sum and the kernel's own memory are not counted, and no share "
        "of the processors can be set.",
        _always(
            "run in a delegated group (systemd-run --user --scope -p Delegate=yes), or as root; JailOptions(cgroup='require') refuses to "
            "go without"
        ),
        absent=Status.CAUTION,
    ),
    Layer(
        "memory files", kernel.memory_files,
        "A context is written once, and no guest can change it.",
        "The jail does not start: its own program and the contexts are handed over in sealed memory files.",
        _always(_KERNEL_REMEDY),
    ),
    Layer(
        "mapped text", kernel.mapped_texts,
        "A context of any size reaches a guest at once and costs it no memory.",
        "Each session reads its own copy of a context, which takes time and counts against memory_mb.",
        _always("use CPython 3.11, 3.12 or 3.13, 64-bit, in its ordinary build"), absent=Status.CAUTION,
    ),
)  # fmt: skip


def examine_layers() -> Iterator[Finding]:
    """Try every layer. The process must have no other thread: each trial is a fork of it."""
    missing: set[str] = set()
    for layer in LAYERS:
        lacking = [name for name in layer.needs if name in missing]
        if lacking:
            missing.add(layer.name)
            yield _finding(layer, Status.SKIPPED, f"not tried: it needs {' and '.join(lacking)}", "It is not known.", "")
            continue
        result = attempt(layer.trial)
        if result.works:
            yield _finding(layer, Status.PASS, result.found, layer.gives, "")
        else:
            missing.add(layer.name)
            yield _finding(layer, layer.absent, result.found, layer.without, layer.remedy(result))


def _finding(layer: Layer, status: Status, found: str, consequence: str, remedy: str) -> Finding:
    return Finding(backend=_BACKEND, layer=layer.name, status=status, found=found, consequence=consequence, remedy=remedy)
