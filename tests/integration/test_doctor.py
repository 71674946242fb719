"""The doctor on this machine, and on one without user namespaces: the same machine, with their number set to none."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from rlm_sandbox import available
from rlm_sandbox.diagnosis import Status
from rlm_sandbox.diagnosis.child import LAYERS, examine
from rlm_sandbox.registry import AUTO_ORDER, load_backend

from ..conftest import require_usable

#: Every backend is tried; on a loaded machine that takes more than a test usually has.
pytestmark = pytest.mark.timeout(300)
DOCTOR = [sys.executable, "-m", "rlm_sandbox", "doctor", "--json"]

#: Becomes "root" of a user namespace that may have no other below it, and then the command.
_WITHOUT_NAMESPACES = """
import os, sys
from rlm_sandbox.confine import _syscalls_unsafe as raw
uid, gid = os.geteuid(), os.getegid()
try:
    raw.unshare(raw.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
except OSError as exc:
    sys.exit(f"SKIP: {exc.strerror}")
os.execv(sys.argv[1], sys.argv[1:])
"""


def _run(*command: str, cwd: Path | None = None) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd)
    if done.stderr.startswith("SKIP"):
        pytest.skip(f"user namespaces cannot be taken away here: {done.stderr}")
    assert "Traceback" not in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def _statuses(report: dict[str, Any], backend: str) -> dict[str, str]:
    return {item["layer"]: item["status"] for item in report["findings"] if item["backend"] == backend}


def test_this_machine() -> None:
    code, report = _run(*DOCTOR)
    found = available()
    assert report["usable"] == (code == 0)
    assert report["auto"] == next((name for name in AUTO_ORDER if found[name].usable), None)
    for name, state in found.items():
        statuses = _statuses(report, name)
        assert ("FAIL" not in statuses.values()) == state.usable
        if state.usable:
            assert {statuses[layer] for layer in ("session", "cell", "kill")} == {"PASS"}
            # `restricted` is what it says it is: no isolation, no memory limit.
            expected = {"SKIPPED", "CAUTION"} if name == "restricted" else {"PASS"}
            assert {statuses[layer] for layer in ("memory", "limits")} == expected
        if state.usable and name == "restricted":
            said = [item["consequence"] for item in report["findings"] if (item["backend"], item["layer"]) == (name, "limits")]
            assert "isolation: none against an adversary." in said[0], "README.md and SECURITY.md say the same"
    for item in report["findings"]:
        assert item["consequence"].endswith(".")
        assert item["status"] in ("PASS", "SKIPPED") or item["remedy"]


def test_a_machine_without_user_namespaces() -> None:
    """Where the jail does not work, ``auto`` is wasm."""
    require_usable("wasm", load_backend("wasm").probe())
    code, report = _run(sys.executable, "-c", _WITHOUT_NAMESPACES, *DOCTOR)
    assert (code, report["usable"], report["auto"], report["auto_error"]) == (0, True, "wasm", None)
    statuses = _statuses(report, "jail")
    assert (statuses["user namespaces"], statuses["start"]) == ("FAIL", "FAIL")
    assert {statuses[name] for name in ("id maps", "mount namespace", "pivot_root", "task limit")} == {"SKIPPED"}
    assert {statuses[name] for name in ("kernel", "seccomp filter", "pidfds", "memory limits")} == {"PASS"}
    remedies = {item["remedy"] for item in report["findings"] if item["backend"] == "jail" and item["remedy"]}
    assert remedies == {"run: sysctl user.max_user_namespaces=10000"}


def test_a_machine_on_which_wasm_does_not_work_either(tmp_path: Path) -> None:
    """The cache cannot be made: one sentence for ``auto``, and the row that fails has the remedy."""
    (tmp_path / "file").write_text("")
    without_cache = ("env", f"RLM_SANDBOX_CACHE={tmp_path / 'file'}", *DOCTOR)
    code, report = _run(sys.executable, "-c", _WITHOUT_NAMESPACES.replace("execv", "execvp"), *without_cache)
    assert code == 1
    assert (report["usable"], report["auto"]) == (False, None)
    assert "\n" not in report["auto_error"]
    assert "user.max_user_namespaces" in report["auto_error"]
    assert "RLM_SANDBOX_CACHE" in report["auto_error"]
    assert _statuses(report, "wasm")["cache"] == "FAIL"


def test_the_parts_of_wasm() -> None:
    require_usable("wasm", load_backend("wasm").probe())
    findings = examine("wasm", LAYERS)
    assert [item.layer for item in findings] == ["engine", "cache", "component", "compiled code", "threads", "address space"]
    assert {item.status for item in findings} <= {Status.PASS, Status.CAUTION}
    said = {item.layer: item.found for item in findings}
    assert said["engine"] == f"wasmtime {version('wasmtime')}"
    assert "sha256" in said["component"]
    assert "closed to others" in said["cache"]


def test_nothing_is_imported_from_where_it_runs(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('this file was imported')")
    done = subprocess.run(
        [sys.executable, "-P", *DOCTOR[1:]], capture_output=True, text=True, timeout=280, cwd=tmp_path
    )  # fmt: skip
    assert "this file was imported" not in done.stderr
    assert {item["backend"] for item in json.loads(done.stdout)["findings"]} == set(available())
