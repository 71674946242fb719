"""However the host process ends, nothing of its sessions is left; and a thread that ends is not the host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

import psutil
import pytest

from rlm_sandbox import REPLProtocol

from .conftest import OpenJail
from .outside import SessionProcesses, wait_until

_HOST: Final = """
import json, os, sys, threading, time
import psutil
from rlm_sandbox import Limits, open_repl
repls = [open_repl("jail", limits=Limits(time_seconds=60)) for _ in range(2)]
for repl in repls:
    assert repl.exec("x = 1").ok
helper = 0
{state}
time.sleep(0.3)
below = [
    p.pid for p in psutil.Process().children(recursive=True) if p.pid != helper and p.status() != psutil.STATUS_ZOMBIE
]
print(json.dumps([below, helper]), flush=True)
{rest}
"""
_FORK: Final = "helper = os.fork()\nif helper == 0:\n    time.sleep(30)\n    os._exit(0)"
_STATES: Final = {
    "idle": ("", "time.sleep(60)"),
    "busy": ("threading.Thread(target=repls[0].exec, args=('while True: pass',), daemon=True).start()", "time.sleep(60)"),
    "busy in C": ("threading.Thread(target=repls[0].exec, args=('sum(range(10**14))',), daemon=True).start()", "time.sleep(60)"),
    "in a host call": (
        (
            "repls[0].bind('wait', lambda: time.sleep(60))\n"
            "threading.Thread(target=repls[0].exec, args=('wait()',), daemon=True).start()"
        ),
        "time.sleep(60)",
    ),
    "deaf to signals": (
        (
            "threading.Thread(target=repls[0].exec, args=('import signal\\nfor n in range(1, 65):\\n try: signal.signal(n, signal.SIG_IGN)"
            "\\n except (OSError, ValueError): pass\\nwhile True: pass',), daemon=True).start()"
        ),
        "time.sleep(60)",
    ),
    "a forked child lives": (_FORK, "time.sleep(60)"),
    "busy, and a forked child lives": (
        f"{_FORK}\nthreading.Thread(target=repls[0].exec, args=('while True: pass',), daemon=True).start()",
        "time.sleep(60)",
    ),
}


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("how", [signal.SIGKILL, None], ids=["SIGKILL", "exit"])
@pytest.mark.parametrize("state", _STATES.values(), ids=_STATES)
def test_nothing_outlives_the_host(state: tuple[str, str], how: signal.Signals | None) -> None:
    begin, rest = state
    if how is None:
        rest = "os._exit(0)"
    project = str(Path(__file__).parents[2])
    host = subprocess.Popen(
        [sys.executable, "-c", _HOST.format(state=begin, rest=rest)], stdout=subprocess.PIPE, cwd=project, text=True
    )
    assert host.stdout is not None
    helper = 0
    try:
        below, helper = json.loads(host.stdout.readline())
        # Launcher and zygote, and of each session at least supervisor and worker.
        assert len(below) >= 6
        if how is not None:
            assert all(_alive(pid) for pid in below)
            host.send_signal(how)
        host.wait(60)
        wait_until(lambda: not any(_alive(pid) for pid in below), "processes of a session outlived their host")
        if helper:
            assert _alive(helper), "the child was to live, or this shows nothing"
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
        if helper:
            os.kill(helper, signal.SIGKILL)


def test_the_thread_that_opened_a_session_may_end(open_jail: OpenJail, processes: SessionProcesses) -> None:
    opened: list[REPLProtocol] = []
    thread = threading.Thread(target=lambda: opened.append(open_jail(None)))
    thread.start()
    thread.join()
    (repl,) = opened
    assert repl.exec("x = 41").ok
    answers: list[str | None] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: answers.append(repl.exec("x = x + 1\nx").value))
        thread.start()
        thread.join()
    assert answers == ["42", "43", "44"]
    assert repl.exec("import os\nos._exit(0)").state == "restored"
    assert repl.exec("x").value == "44"
    processes.assert_quiet()


def test_closing_ends_a_session_that_resists(open_jail: OpenJail, processes: SessionProcesses) -> None:
    repl = open_jail(None)
    repl.exec(
        "import signal, threading\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "def spin():\n    while True: pass\nfor _ in range(3): threading.Thread(target=spin, daemon=True).start()"
    )
    assert processes.alive()
    repl.close()
    processes.assert_gone()
