"""What a cell leaves behind for the next one: a full heap, or work that goes on after its end."""

from __future__ import annotations

import pytest

from rlm_sandbox import Limits, REPLProtocol

from .conftest import OpenJail

_FILL = "hog = []\ntry:\n    while True:\n        hog.append('x' * 100_000)\nexcept MemoryError:\n    pass\n"
_SLOW_FORK = (
    "import os, time\n"
    "def slow():\n"
    "    until = time.process_time() + 0.5\n"
    "    while time.process_time() < until:\n"
    "        pass\n"
    "os.register_at_fork(before=slow)\n"
)


@pytest.fixture
def small(open_jail: OpenJail) -> REPLProtocol:
    return open_jail(Limits(memory_mb=100, time_seconds=10))


def test_a_cell_cannot_leave_the_heap_full(small: REPLProtocol) -> None:
    """It caught its MemoryError and ended well; a recovery point as full as this would fail every later cell."""
    assert small.exec("kept = 41").ok
    result = small.exec(_FILL)
    assert (result.outcome, result.state) == ("limit", "restored")
    assert result.limit is not None
    assert (result.limit.kind, result.limit.source) == ("memory_mb", "host")
    after = small.exec("kept + 1")
    assert (after.value, after.state) == ("42", "kept")


def test_a_heap_below_the_limit_is_kept(small: REPLProtocol) -> None:
    result = small.exec("hog = ['x' * 100_000 for _ in range(700)]")
    assert (result.outcome, result.state) == ("ok", "kept")
    assert small.exec("len(hog)").value == "700"


def test_cpu_between_turns_is_charged_to_the_next_cell(small: REPLProtocol) -> None:
    """The fork of the recovery point runs code of the cell's, after the cell: half a second of CPU."""
    assert small.exec(_SLOW_FORK).ok
    result = small.exec("1")
    assert result.ok
    assert result.usage.time_seconds is not None
    assert result.usage.time_seconds > 0.4


def test_what_a_get_used_is_not_charged_again(small: REPLProtocol) -> None:
    assert small.exec("import time\nclass Slow:\n    def __repr__(self):\n        until = time.process_time() + 0.4\n"
                      "        while time.process_time() < until:\n            pass\n        return 'slow'\nslow = Slow()").ok  # fmt: skip
    small.get("slow")
    result = small.exec("1")
    assert result.usage.time_seconds is not None
    assert result.usage.time_seconds < 0.3


def test_the_declared_worst_case_counts_every_copy_of_a_heap(small: REPLProtocol) -> None:
    # Heaps, /tmp, the kernel's own for them, the supervisor.
    assert small.capabilities.host_memory_worst_mb == 3 * 100 + 64 + 64 + 5
