"""Memory pressure: how it is seen, and that the standby goes first and the result says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rlm_sandbox import Limits, open_repl
from rlm_sandbox.bridge import pressure
from rlm_sandbox.bridge.pressure import MemoryPressure
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from ..escape.outside import SessionProcesses, wait_until

MB = 1 << 20


class Machine:
    """A /proc and a /sys/fs/cgroup of files."""

    def __init__(self, root: Path, version: int) -> None:
        self.proc, self.groups, self.version = root / "proc", root / "cgroup", version
        (self.proc / "self").mkdir(parents=True)
        folder = self.groups / ("" if version == 2 else "memory") / "outer" / "inner"
        folder.mkdir(parents=True)
        self.inner, self.outer = folder, folder.parent
        (self.proc / "self/cgroup").write_text(
            "0::/outer/inner\n" if version == 2 else "5:cpu:/x\n4:memory:/outer/inner\n1:name=systemd:/\n"
        )
        self.free(8_000)

    def free(self, available_mb: int) -> None:
        (self.proc / "meminfo").write_text(f"MemTotal: {8_000 * 1024} kB\nMemFree: 10 kB\nMemAvailable: {available_mb * 1024} kB\n")

    def group(self, folder: Path, limit: str, used: int, droppable: int = 0) -> None:
        names = (
            ("memory.max", "memory.current", "")
            if self.version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        )
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]}inactive_file {droppable}\n")

    def pressure(self) -> MemoryPressure:
        return MemoryPressure(self.proc, self.groups)


@pytest.mark.parametrize("version", [1, 2])
def test_pressure_is_seen_on_the_machine_and_in_every_group_above(tmp_path: Path, version: int) -> None:
    machine = Machine(tmp_path, version)
    assert not machine.pressure().is_high()
    machine.free(200)
    assert machine.pressure().is_high()
    machine.free(4_000)
    assert not machine.pressure().is_high()
    for folder in (machine.inner, machine.outer):
        machine.group(folder, str(1_000 * MB), 500 * MB)
        seen = machine.pressure()
        assert not seen.is_high()
        machine.group(folder, str(1_000 * MB), 960 * MB)
        assert seen.is_high()
        machine.group(folder, str(1_000 * MB), 990 * MB, droppable=400 * MB)
        assert not seen.is_high(), "pages of files can be dropped at once"
        machine.group(folder, "max" if version == 2 else str(1 << 63), 990 * MB)
        assert not seen.is_high()


def test_a_look_after_every_cell_is_half_a_second_old_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, 2)
    now = 100.0
    monkeypatch.setattr(pressure, "time", SimpleNamespace(monotonic=lambda: now))
    seen = machine.pressure()
    assert not seen.was_high()
    machine.free(10)
    assert not seen.was_high()
    now += 0.5
    assert seen.was_high()


def test_where_nothing_can_be_read_there_is_no_pressure(tmp_path: Path) -> None:
    assert not MemoryPressure(tmp_path / "no", tmp_path / "nothing").is_high()
    machine = Machine(tmp_path, 2)
    (machine.proc / "meminfo").write_text("nonsense")
    (machine.inner / "memory.max").write_text("100")
    assert not machine.pressure().is_high()


class Short(MemoryPressure):
    """Pressure as the test says."""

    high = False

    def is_high(self) -> bool:
        return self.high

    was_high = is_high


def test_under_pressure_the_standby_goes_first_and_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    require_usable("jail", load_backend("jail").probe())
    short = Short()
    monkeypatch.setattr(pressure, "_own", short)
    open_repl("jail").close()  # what serves all sessions is there from now on, and not counted
    processes = SessionProcesses()
    with open_repl("jail", limits=Limits(memory_mb=64)) as repl:
        repl.bind("pressure", lambda value: setattr(short, "high", value))
        assert repl.exec("import os, time\nx = 1").protected
        wait_until(lambda: len(processes.alive()) >= 3, "there is no standby", seconds=20)
        # In the middle of a cell.
        during = repl.exec("pressure(True)\ntime.sleep(0.5)")
        assert (during.outcome, during.state, during.protected) == ("ok", "kept", False)
        wait_until(lambda: len(processes.alive()) == 2, "more is there than supervisor and worker", seconds=20)
        # As long as it lasts no other is made, and a kill costs what is said to be unprotected.
        result = repl.exec("y = x + 1\ny")
        assert (result.value, result.protected) == ("2", False)
        killed = repl.exec("os._exit(1)")
        assert (killed.state, killed.protected) == ("lost", False)
        assert {"x", "y"} <= set(killed.lost_names)
        # Afterwards the next cell is protected again.
        short.high = False
        assert repl.exec("import os\nx = 1").protected
        assert repl.exec("os._exit(1)").state == "restored"
        assert repl.get("x") == 1
