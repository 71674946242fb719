"""The order of confinement of a plain child: a process with limits of its own and nothing around it.

For hosts that have no jail. What POSIX offers, and no more: the kernel bounds memory, processor time and descriptors, and the
host kills from outside. Files and the network are not kept out by any of this. Each start tries whether the limits
bind: where they do not, the child says so and ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import secrets
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import _syscalls_unsafe as raw

__all__ = ("PlainLimits", "confine_plain")

_MB: Final = 1024 * 1024
_MAX_DESCRIPTORS: Final = 64
#: Address space beyond memory: where data is counted apart (Linux), room for mapped contexts; else for libraries and stacks.
_SLACK_MB: Final = {"linux": 1024}
_SLACK_ELSEWHERE_MB: Final = 256
#: Ids that belong to nobody: above what systemd gives to containers, as in the launcher; a host whose ids end before has "nobody".
_FIRST_ID: Final = 0x70000000
_IDS: Final = 0x0FFF0000
_NOBODY: Final = 65534


@dataclass(frozen=True, slots=True)
class PlainLimits:
    """MiB of memory beside what the interpreter itself has, and seconds of processor time; None is unlimited. ``parent``: the host."""

    memory_mb: int | None
    cpu_seconds: int | None
    parent: int


def _no_privileges(_limits: PlainLimits) -> None:
    """Root may raise its own limits, so it becomes somebody else first."""
    if os.geteuid() == 0:
        os.setgroups([])
        for number in (_FIRST_ID + secrets.randbelow(_IDS), _NOBODY):
            try:
                os.setgid(number)
                os.setuid(number)
                break
            except OSError:  # an id that this user namespace does not have
                continue
        if os.geteuid() == 0:
            raise PermissionError("root could not give up its rights")
    if sys.platform == "linux":
        raw.prctl(raw.PR_SET_NO_NEW_PRIVS, 1)


def _end_with_parent(limits: PlainLimits) -> None:
    """After the change of id, which clears it. The parent is the thread that started this process: one that stays."""
    if sys.platform == "linux":
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != limits.parent:
        raise ProcessLookupError("the host has ended")


def _memory(limits: PlainLimits) -> None:
    if limits.memory_mb is None:
        return
    data, address_space = _own_sizes()
    slack = _SLACK_MB.get(sys.platform, _SLACK_ELSEWHERE_MB)
    if sys.platform == "linux":  # elsewhere this is the heap below brk() only
        _set(resource.RLIMIT_DATA, data + limits.memory_mb * _MB)
    _set(resource.RLIMIT_AS, address_space + (limits.memory_mb + slack) * _MB)


def _own_sizes() -> tuple[int, int]:
    """Bytes of data and of address space this process uses already."""
    if sys.platform == "linux":
        lines = {name: rest.split() for name, _, rest in (line.partition(":") for line in _read_status())}
        return int(lines["VmData"][0]) * 1024, int(lines["VmSize"][0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0, peak if sys.platform == "darwin" else peak * 1024


def _read_status() -> list[str]:
    return Path("/proc/self/status").read_text().splitlines()


def _other_limits(limits: PlainLimits) -> None:
    _set(resource.RLIMIT_CORE, 0)
    _set(resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS)
    _set(resource.RLIMIT_FSIZE, 0)
    _set(resource.RLIMIT_STACK, 8 * _MB)
    with contextlib.suppress(ValueError, OSError):  # some systems count all of a user's processes and refuse a limit below that
        _set(resource.RLIMIT_NPROC, 0)
    if limits.cpu_seconds is not None:
        _set(resource.RLIMIT_CPU, limits.cpu_seconds)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _set(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _limits_bind(limits: PlainLimits) -> None:
    """Try it: more memory than the limit is refused, and so is a higher limit."""
    if limits.memory_mb is None:
        return
    size, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size + _MB))
    except (ValueError, OSError):
        pass
    else:
        raise PermissionError("this system lets a process raise its own limits")
    try:
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANON).close()
    except (OSError, MemoryError):
        return
    raise OSError("this system does not enforce RLIMIT_AS")


def confine_plain(limits: PlainLimits) -> None:
    """Limit this process, which has imported all it will need: later it may be somebody who cannot read the library.

    Raises:
        OSError, ValueError: a step failed, or a limit does not bind here; the caller must end the process.
    """
    steps: list[Callable[[PlainLimits], None]] = [_no_privileges, _end_with_parent, _memory, _other_limits, _limits_bind]
    for step in steps:
        step(limits)
