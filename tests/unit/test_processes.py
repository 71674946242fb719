"""Handles to processes of a session."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from rlm_sandbox.runners.processes import ByPid

#: Three threads: two that compute and one that waits.
_BUSY = """
import threading
def spin():
    while True: pass
for _ in range(2): threading.Thread(target=spin, daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


def _states(pid: int) -> set[str]:
    return {(path / "stat").read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").iterdir()}


def test_a_process_that_was_told_to_stop_has_stopped() -> None:
    """Every thread has, before anybody could say SIGCONT: gVisor loses one that comes while the stop takes effect."""
    with subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            process = ByPid(child.pid)
            for _ in range(100):
                process.signal(signal.SIGSTOP)
                assert _states(child.pid) == {"T"}
                process.signal(signal.SIGCONT)
        finally:
            child.kill()


def test_one_that_has_ended_is_not_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()  # it is ending; nobody has waited for it yet, so its number is still its own
        ByPid(child.pid).signal(signal.SIGSTOP)
