"""`fork_with`: a child of a process whose other threads want the interpreter, which it does not have, goes on."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the system call's number is that of Linux on x86-64"
)

#: In an interpreter of its own: this one's threads are pytest's.
_SCRIPT = """
import os, select, signal, sys, threading
from rlm_sandbox.confine._syscalls_unsafe import fork_with

sys.setswitchinterval(1e-5)  # each of them asks for the interpreter at once, so it is wanted whenever a fork is made

def busy():
    while True:
        pass

for _ in range(2):
    threading.Thread(target=busy, daemon=True).start()

def in_child(write):
    thread = threading.Thread(target=os.write, args=(write, b"x"))  # it lets go of the interpreter, and gets it back
    thread.start()
    thread.join()

for round in range(20):
    read, write = os.pipe()
    pid = fork_with(7)
    if pid == 0:
        try:
            in_child(write)
        finally:
            os._exit(0)
    os.close(write)
    poll = select.poll()
    poll.register(read, select.POLLIN)
    came = bool(poll.poll(20_000)) and os.read(read, 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    if not came:
        print(f"the child of round {round} hangs", flush=True)
        os._exit(1)
os._exit(0)
"""


def test_a_child_does_not_wait_for_threads_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_refused_fork_says_why() -> None:
    script = """
import gc, resource
from rlm_sandbox.confine._syscalls_unsafe import fork_with
import os
if os.getuid() == 0:
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    pid = fork_with(7)
except OSError as exc:
    assert exc.errno == 11, exc
    assert gc.isenabled()
else:
    os._exit(1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
