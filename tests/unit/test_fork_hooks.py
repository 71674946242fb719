"""Locks and threads of the standard library in a forked child: as they should be, whether or not the parent had threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rlm_sandbox

_FILE = Path(rlm_sandbox.__file__).parent / "runners" / "fork_hooks.py"
#: In an interpreter of its own: it must not have loaded what registers hooks.
_BEGIN = f"""
import os, sys, runpy
assert "threading" not in sys.modules
lean = runpy.run_path({str(_FILE)!r})["lean_fork_hooks"]
with lean():
    import concurrent.futures.thread, logging, random, threading
def in_child(act):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def use_all():
    done = []
    def work():
        logging.getLogger("x").setLevel(10)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            done.append(sum(threads.map(abs, range(5))))
    thread = threading.Thread(target=work, daemon=True)
    thread.start(); thread.join(20)
    assert done == [10], done
    assert threading.active_count() == 1 and threading.main_thread() is threading.current_thread()
"""


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", _BEGIN + script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@pytest.mark.parametrize("depth", [1, 3])
def test_a_child_of_a_process_without_threads_can_use_its_locks(depth: int) -> None:
    run(f"""
def deeper(depth):
    use_all()
    if depth > 1:
        assert in_child(lambda: deeper(depth - 1)) == 0
assert in_child(lambda: deeper({depth})) == 0
use_all()
print("fine")
""")


def test_a_child_of_a_process_with_threads_gets_locks_of_its_own() -> None:
    """The other thread holds the lock of `logging` handlers and is still there, in the parent only."""
    run("""
handler = logging.StreamHandler()
held, go = threading.Event(), threading.Event()
def hold():
    with handler.lock:
        held.set(); go.wait(30)
thread = threading.Thread(target=hold, daemon=True)
thread.start(); held.wait(10)
def child():
    assert threading.active_count() == 1, threading.enumerate()
    assert handler.lock.acquire(timeout=5) if hasattr(handler.lock, "acquire") else True
    use_all()
assert in_child(child) == 0
go.set(); thread.join(10)
use_all()
assert in_child(use_all) == 0
print("fine")
""")


def test_what_is_not_about_threads_is_done_in_every_child() -> None:
    run("""
numbers = []
for _ in range(3):
    read, write = os.pipe()
    assert in_child(lambda: os.write(write, str(random.random()).encode())) == 0
    numbers.append(os.read(read, 99))
assert len(set(numbers)) == 3, numbers
ran = []
os.register_at_fork(after_in_child=lambda: ran.append(1))
assert in_child(lambda: None if ran == [1] else 1 / 0) == 0
print("fine")
""")
