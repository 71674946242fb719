"""Control groups: what a whole session may use, counted by the kernel, where this user may make them.

A session's worker and everything that comes of it is in a group of its own; its supervisor, which must survive it, is not.
The limits of a single process hold as they do without: the group adds what they cannot see, which is the sum of worker and
standby, and the kernel's own memory for them (page tables, sockets, pipes). Version 2 is used where it has the controllers,
version 1 otherwise.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...bridge.guest import GuestLost
from ...errors import BackendUnavailable
from ...limits import Limits
from .channels import MORE_DESCRIPTORS, check_descriptors

__all__ = ("CONTROLLERS", "REMEDY", "Hierarchy", "SessionGroup", "check_required", "find_hierarchy", "hierarchy", "worst_memory_mb")

CONTROLLERS: Final = ("memory", "pids", "cpu")
_MB: Final = 1 << 20
#: Copies of a heap at worst: the worker, its standby, and the next standby while it takes the other's place.
_COPIES: Final = 3
#: The interpreter's own pages, page tables, sockets and pipes. A full table of 65,530 mappings takes more, and ends the cell.
_KERNEL_MB: Final = 64
#: Supervisor's forks and kept copies, beside the tasks of the guest, which RLIMIT_NPROC counts exactly.
_MORE_TASKS: Final = 40
_PERIOD: Final = 100_000
_END_SECONDS: Final = 0.2
#: Descriptors that the look at the groups needs: a child with a pipe, and files.
_FOR_A_LOOK: Final = 12
_PREFIX: Final = "rlm-sandbox-"
_numbers = itertools.count(1)


def worst_memory_mb(limits: Limits, *, recovery: bool) -> int | None:
    """The most memory a session's group may take, in MiB; None if it is not bounded."""
    if limits.memory_mb is None or limits.disk_mb is None:
        return None
    return limits.memory_mb * (_COPIES if recovery else 1) + limits.disk_mb + _KERNEL_MB


def check_required() -> None:
    """Raises `BackendUnavailable` where a group bounds not both memory and tasks."""
    missing = [name for name in ("memory", "pids") if name not in hierarchy().places]
    if missing:
        raise BackendUnavailable("jail", f"a cgroup is required, and there is none for {' and '.join(missing)}", REMEDY)


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Directories in which groups can be made, by controller; ``unified`` if they are all one (version 2)."""

    places: Mapping[str, Path]
    unified: bool


@functools.cache
def hierarchy() -> Hierarchy:
    """What this process may use, found by making a group. Looked at once."""
    try:
        check_descriptors(_FOR_A_LOOK)  # short of them, what is there would not be seen, and never looked for again
    except GuestLost as exc:
        raise BackendUnavailable("jail", f"its cgroups cannot be looked at ({exc})", MORE_DESCRIPTORS) from None
    try:
        found = find_hierarchy(Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    except (OSError, ValueError):
        return Hierarchy({}, unified=False)  # a kernel without groups
    works = _tried(set(found.places.values()))
    for place in works:
        _sweep(place)
    return Hierarchy({name: place for name, place in found.places.items() if place in works}, found.unified)


def find_hierarchy(mounts: str, own: str) -> Hierarchy:
    """Where groups of this process could be made.

    Args:
        mounts: the text of ``/proc/self/mounts``.
        own: the text of ``/proc/self/cgroup``.
    """
    paths = {part: path for line in own.splitlines() for _, names, path in [line.split(":", 2)] for part in names.split(",")}
    versions: dict[str, list[tuple[Path, list[str]]]] = {"cgroup": [], "cgroup2": []}
    for line in mounts.splitlines():
        fields = line.split()
        if fields[2] in versions:
            versions[fields[2]].append(
                (Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[1])), fields[3].split(","))
            )
    for root, _ in versions["cgroup2"]:
        place = _delegated(root, _below(root, paths.get("", "/")))
        if place is not None:
            enabled = (place / "cgroup.subtree_control").read_text().split()
            return Hierarchy({name: place for name in CONTROLLERS if name in enabled}, unified=True)
    found: dict[str, Path] = {}
    for root, options in versions["cgroup"]:
        for name in CONTROLLERS:
            if name in options:
                found[name] = _below(root, paths.get(name, "/"))
    return Hierarchy(found, unified=False)


def _below(root: Path, path: str) -> Path:
    """A group's directory. In a cgroup namespace the path may be the host's, or lead up and out: then the root that is seen."""
    place = root / path.lstrip("/")
    return place if ".." not in place.parts and place.is_dir() else root


def _delegated(root: Path, own: Path) -> Path | None:
    """The nearest group above this process, or its own, whose children are counted and which this user may write to."""
    for place in (own, *own.parents):
        if not place.is_relative_to(root):
            return None
        try:
            enabled = (place / "cgroup.subtree_control").read_text().split()
        except OSError:
            continue
        if "memory" in enabled and os.access(place, os.W_OK) and os.access(place / "cgroup.procs", os.W_OK):
            return place
    return None


def _tried(places: set[Path]) -> set[Path]:
    """Those in which a group can be made, and a process of this user be put into it."""
    if not places:
        return set()
    works = set()
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        for place in places:
            group = place / f"{_PREFIX}{os.getpid()}-trial"
            try:
                group.mkdir()
                (group / "cgroup.procs").write_text(str(child.pid))
                works.add(place)
            except OSError:
                _remove(group)
        child.kill()
    for place in works:
        _remove(place / f"{_PREFIX}{os.getpid()}-trial")
    return works


def _sweep(place: Path) -> None:
    """Remove groups of hosts that were killed."""
    for group in place.glob(f"{_PREFIX}*"):
        owner = group.name[len(_PREFIX) :].partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _remove(group)


def _remove(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


class SessionGroup:
    """The group of one session. Thread-safe."""

    def __init__(self, limits: Limits, *, recovery: bool, cpus: float | None) -> None:
        """
        Raises:
            BackendUnavailable: ``cpus`` was asked for and cannot be enforced, or a group cannot be made where others could.
        """
        found = hierarchy()
        if cpus is not None and "cpu" not in found.places:
            raise BackendUnavailable("jail", "a share of the processors needs a cgroup, which this user cannot make", REMEDY)
        self._unified = found.unified
        name = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        # Version 1 has a tree for each controller: the processors' only where a share was asked for.
        self._groups = {what: place / name for what, place in found.places.items() if what != "cpu" or cpus is not None}
        self._oom_seen = 0
        try:
            for group in set(self._groups.values()):
                group.mkdir()
            for group, file, value in self._settings(limits, recovery, cpus):
                (group / file).write_text(value)
            self._oom_seen = self._oom_kills()
        except OSError as exc:
            self.close()
            raise BackendUnavailable("jail", f"the cgroup of a session cannot be made ({exc.strerror})", REMEDY) from exc

    def _settings(self, limits: Limits, recovery: bool, cpus: float | None) -> Iterator[tuple[Path, str, str]]:
        worst = worst_memory_mb(limits, recovery=recovery)
        memory, pids, cpu = (self._groups.get(name) for name in CONTROLLERS)
        if memory is not None and worst is not None:
            if self._unified:
                yield memory, "memory.max", str(worst * _MB)
                if (memory / "memory.swap.max").exists():
                    yield memory, "memory.swap.max", "0"
                yield memory, "memory.oom.group", "0"
            else:
                yield memory, "memory.limit_in_bytes", str(worst * _MB)
                if (memory / "memory.memsw.limit_in_bytes").exists():
                    yield memory, "memory.memsw.limit_in_bytes", str(worst * _MB)
        if pids is not None and limits.processes is not None:
            yield pids, "pids.max", str(limits.processes + _MORE_TASKS)
        if cpu is not None and cpus is not None:
            quota = max(1_000, int(cpus * _PERIOD))
            if self._unified:
                yield cpu, "cpu.max", f"{quota} {_PERIOD}"
            else:
                yield cpu, "cpu.cfs_period_us", str(_PERIOD)
                yield cpu, "cpu.cfs_quota_us", str(quota)

    def entrances(self) -> list[int]:
        """Descriptors by which a process puts itself into the group, by writing "0"; none where `add` has to do it.

        A process that moves itself, alone, is all that version 1 moves without a wait for every processor of the machine,
        which takes 10 ms and more (``cgroup_attach_lock`` of the kernel).

        Raises:
            OSError: they cannot be opened.
        """
        if self._unified:
            return []
        opened: list[int] = []
        try:
            for group in set(self._groups.values()):
                opened.append(os.open(group / "tasks", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        return opened

    def add(self, pid: int) -> None:
        """Put a process, which has run nothing of the guest yet, into the group.

        Raises:
            OSError: the kernel refuses. It is not an error that the process is gone.
        """
        for group in set(self._groups.values()):
            try:
                (group / "cgroup.procs").write_text(str(pid))
            except ProcessLookupError:
                return

    def ran_out(self) -> bool:
        """Whether the kernel has ended a process of the group for want of memory since this was last asked."""
        before, self._oom_seen = self._oom_seen, self._oom_kills()
        return self._oom_seen > before

    def _oom_kills(self) -> int:
        memory = self._groups.get("memory")
        if memory is None:
            return 0
        try:
            text = (memory / ("memory.events" if self._unified else "memory.oom_control")).read_text()
        except OSError:
            return self._oom_seen
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        return int(found[1]) if found else 0

    def peak_mb(self) -> float | None:
        """The most memory the group has used so far, in MiB."""
        memory = self._groups.get("memory")
        if memory is None:
            return None
        try:
            return int((memory / ("memory.peak" if self._unified else "memory.max_usage_in_bytes")).read_text()) / _MB
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Remove the group, whose processes have been killed. What the kernel does not let go of yet is swept later."""
        until = time.monotonic() + _END_SECONDS
        left = [group for group in {*self._groups.values(), *_left_behind} if not _remove(group)]
        while left and time.monotonic() < until:
            time.sleep(0.002)
            left = [group for group in left if not _remove(group)]
        _left_behind.clear()
        _left_behind.update(left)


#: Groups that were not empty yet: copies of a session share the one they were made in.
_left_behind: Final[set[Path]] = set()


REMEDY: Final = "run as root, or in a delegated group: systemd-run --user --scope -p Delegate=yes; on cgroup v1, make directories of this user's own"
