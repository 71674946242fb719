"""Which group is whose, from texts of /proc; and what is written into a group of version 2. Directories in place of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlm_sandbox import Limits
from rlm_sandbox.backends.jail import cgroups


def test_version_1_has_a_place_for_each_controller(tmp_path: Path) -> None:
    (tmp_path / "memory" / "own").mkdir(parents=True)
    (tmp_path / "pids").mkdir()
    mounts = (
        f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\ncgroup {tmp_path}/pids cgroup rw,nosuid,pids 0 0\ntmpfs /x tmpfs rw 0 0\n"
    )
    found = cgroups.find_hierarchy(mounts, "4:memory:/own\n3:pids:/elsewhere\n0::/\n")
    assert found == cgroups.Hierarchy({"memory": tmp_path / "memory" / "own", "pids": tmp_path / "pids"}, unified=False)


def make_group(path: Path, enabled: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cgroup.subtree_control").write_text(enabled)
    (path / "cgroup.procs").write_text("")


def test_version_2_takes_the_nearest_group_that_counts_its_children(tmp_path: Path) -> None:
    root = tmp_path / "with space"
    make_group(root, "memory pids cpu io")
    make_group(root / "slice", "memory pids")
    make_group(root / "slice" / "scope", "")
    mounts = f"cgroup2 {str(root).replace(' ', chr(92) + '040')} cgroup2 rw 0 0\n"
    found = cgroups.find_hierarchy(mounts, "0::/slice/scope\n")
    assert found == cgroups.Hierarchy({"memory": root / "slice", "pids": root / "slice"}, unified=True)
    # In a cgroup namespace: the root that is seen, and nothing above it.
    assert set(cgroups.find_hierarchy(mounts, "0::/../../outside\n").places.values()) == {root}


def test_nothing_delegated_is_nothing_found(tmp_path: Path) -> None:
    make_group(tmp_path, "")
    assert cgroups.find_hierarchy(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n", "0::/\n").places == {}
    assert cgroups.find_hierarchy("", "").places == {}


def test_what_is_written_into_a_group_of_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = cgroups.Hierarchy(dict.fromkeys(cgroups.CONTROLLERS, tmp_path), unified=True)
    monkeypatch.setattr(cgroups, "hierarchy", lambda: place)
    group = cgroups.SessionGroup(Limits(memory_mb=100, disk_mb=10, processes=8), recovery=True, cpus=0.5)
    (made,) = tmp_path.iterdir()
    assert (made / "memory.max").read_text() == str((3 * 100 + 10 + 64) << 20)
    assert (made / "pids.max").read_text() == "48"
    assert (made / "cpu.max").read_text() == "50000 100000"
    group.add(4711)
    assert (made / "cgroup.procs").read_text() == "4711"
    (made / "memory.events").write_text("low 0\noom 1\noom_kill 2\noom_group_kill 0\n")
    assert group.ran_out()
    assert not group.ran_out()
    for file in made.iterdir():
        file.unlink()
    group.close()
    assert not made.exists()
    monkeypatch.setattr(cgroups, "hierarchy", lambda: cgroups.Hierarchy({}, unified=False))
    nothing = cgroups.SessionGroup(Limits(), recovery=True, cpus=None)
    nothing.add(1)
    assert not nothing.ran_out()
    assert nothing.peak_mb() is None
    nothing.close()


def test_a_place_where_no_group_can_be_made_is_not_used(tmp_path: Path) -> None:
    """One that is not there, say: found out by making a group, and not by looking."""
    assert cgroups._tried({tmp_path / "missing"}) == set()
    assert cgroups._tried(set()) == set()
