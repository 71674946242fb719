"""A session in a control group: what no limit of a single process sees. Judged by the group's own counters, read outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlm_sandbox import BackendUnavailable, JailOptions, Limits, open_repl
from rlm_sandbox.backends.jail import cgroups

from ..conftest import REQUIRE, is_required
from .outside import SessionProcesses, wait_until

#: 4 KiB mapped every 2 MiB, read-only: each costs a page of page tables, which RLIMIT_DATA and RLIMIT_AS do not count.
PAGE_TABLES = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for number in range(65_000):
    where = libc.mmap(0x100000000000 + number * (1 << 21), 4096, 1, 0x22, -1, 0)
    if where in (None, 2**64 - 1): break
    ctypes.string_at(where, 1)
"""


@pytest.fixture(autouse=True)
def _groups(_usable_jail: None) -> None:
    missing = [name for name in cgroups.CONTROLLERS if name not in cgroups.hierarchy().places]
    if missing and is_required("cgroup"):
        pytest.fail(f"this user can make no group for {', '.join(missing)} ({REQUIRE} names cgroup)")
    if missing:
        pytest.skip(f"this user can make no group for {', '.join(missing)}")


def groups() -> list[Path]:
    places = set(cgroups.hierarchy().places.values())
    return [group for place in places for group in place.glob(f"rlm-sandbox-{os.getpid()}-*")]


def members(group: Path) -> list[str]:
    return (group / "cgroup.procs").read_text().split()


def test_kernel_memory_is_counted_and_the_hit_is_the_kernels_word(processes: SessionProcesses) -> None:
    with open_repl("jail", limits=Limits(memory_mb=50, disk_mb=4, time_seconds=30)) as repl:
        assert {"cgroup memory", "cgroup pids"} <= repl.capabilities.layers
        repl.exec("kept = 5")
        result = repl.exec(PAGE_TABLES)
        assert (result.outcome, result.state) == ("limit", "restored")
        assert result.limit is not None
        assert (result.limit.kind, result.limit.source) == ("memory_mb", "kernel")
        assert (result.limit.observed or 0) <= (repl.capabilities.host_memory_worst_mb or 0)
        assert repl.exec("kept").value == "5"


def test_a_refused_allocation_is_still_the_guests_word(processes: SessionProcesses) -> None:
    with open_repl("jail", limits=Limits(memory_mb=64)) as repl:
        result = repl.exec("bytearray(1 << 30)")
        assert result.limit is not None
        assert (result.limit.kind, result.limit.source) == ("memory_mb", "guest")


def test_every_worker_is_in_the_group_and_the_supervisor_is_not(processes: SessionProcesses) -> None:
    def outside() -> list[int]:
        inside = {pid for group in groups() for pid in members(group)}
        assert inside
        return [process.pid for process in processes.alive() if str(process.pid) not in inside]

    with open_repl("jail", limits=Limits(time_seconds=0.5)) as repl:
        repl.exec("x = 1")
        # A standby that another one has replaced leaves the group before it is gone.
        wait_until(lambda: len(outside()) == 1, "more than the supervisor is outside", seconds=10)
        supervisor = outside()
        for code in ("import os; os._exit(1)", "while True:\n try:\n  while True: pass\n except BaseException: pass"):
            repl.exec(code)
            wait_until(lambda: outside() == supervisor, "more than the supervisor is outside", seconds=10)
        repl.reset()
        wait_until(lambda: outside() == supervisor, "a fresh worker is outside", seconds=10)
    assert groups() == []


def test_a_share_of_the_processors_is_enforced(processes: SessionProcesses) -> None:
    with open_repl("jail", options=JailOptions(cpus=0.2)) as repl:
        repl.exec("import time\nwhile time.process_time() < 0.2: pass")
        throttled = [
            int(line.split()[1])
            for group in groups()
            if (group / "cpu.stat").exists()
            for line in (group / "cpu.stat").read_text().splitlines()
            if line.startswith("nr_throttled")
        ]
        assert sum(throttled) > 0


def test_groups_of_a_host_that_was_killed_are_swept(processes: SessionProcesses) -> None:
    place = next(iter(cgroups.hierarchy().places.values()))
    gone = place / "rlm-sandbox-4194305-1"  # above the largest pid there can be
    gone.mkdir()
    cgroups._sweep(place)
    assert not gone.exists()


def test_a_required_group_that_is_not_to_be_had_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchy", lambda: cgroups.Hierarchy({}, unified=False))
    with pytest.raises(BackendUnavailable, match="memory and pids"):
        open_repl("jail", options=JailOptions(cgroup="require"))
    with pytest.raises(BackendUnavailable, match="processors"):
        open_repl("jail", options=JailOptions(cpus=1))
