"""Sessions of the jail: opening with and without a pool, kills, copies, memory; beside bare pipes to Python in the same run.

    python benchmarks/bench_sessions.py [--rounds N]

One JSON line per figure. What is compared is measured in turns, so that a busy moment of the machine hits all of it; the
figure that holds on a busy machine is the ratio. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from rlm_sandbox import Limits, REPLProtocol, SessionPool, SupportsCheckpoint, SupportsFork, open_repl

_GUEST = "import json, sys\nfor line in sys.stdin: print(json.dumps(str(eval(json.loads(line)))), flush=True)"
_BWRAP = ("bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--unshare-all", "--die-with-parent")


def line(name: str, values: list[float], unit: str, scale: float = 1.0, **parameters: Any) -> float:
    ordered = sorted(value * scale for value in values)
    median = statistics.median(ordered)
    found = {"name": name, "median": round(median, 4), "p90": round(ordered[int(len(ordered) * 0.9)], 4), "unit": unit}
    print(json.dumps({**found, "count": len(ordered), "load": round(os.getloadavg()[0], 1), **parameters}), flush=True)
    return median


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


class Pipe:
    """A Python behind a pipe of JSON lines, as plain as can be."""

    def __init__(self, *before: str) -> None:
        command = [*before, sys.executable, "-I", "-S", "-c", _GUEST]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ask("1")

    def ask(self, code: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def opening(rounds: int) -> None:
    """A session that has answered once, in turns with pipes that have."""
    openers: dict[str, Callable[[], Any]] = {"jail": lambda: open_repl("jail"), "pipe": Pipe}
    if shutil.which("bwrap"):
        openers["bubblewrap pipe"] = lambda: Pipe(*_BWRAP)
    found: dict[str, list[float]] = {name: [] for name in (*openers, "pool hit")}
    with SessionPool("jail", 2, ready=2) as pool:
        for number in range(rounds + 1):
            for name, opener in (("pool hit", pool.open_repl), *openers.items()):
                time.sleep(0.05)  # the pool refills: what it opens beside another opening would be measured, too
                start = time.perf_counter()
                opened = opener()
                if number:
                    found[name].append(time.perf_counter() - start)
                opened.close()
    peer = statistics.median(found.get("bubblewrap pipe", found["pipe"]))
    for name, values in found.items():
        line(f"open: {name}", values, "ms", 1e3, times_faster_than_bubblewrap=round(peer / statistics.median(values), 1))


def pss_mb(repl: Any) -> float:
    """Proportional memory of a session's processes."""
    worker = psutil.Process(repl._guest._worker_pid)
    supervisor = worker.parent()
    assert supervisor is not None
    total = 0
    for process in (supervisor, *supervisor.children(recursive=True)):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += next(int(part.split()[1]) for part in text.splitlines() if part.startswith("Pss:"))
    return total / 1024


def memory(count: int) -> None:
    sessions = [open_repl("jail") for _ in range(count)]
    line("memory: PSS of a session that waits", [pss_mb(repl) for repl in sessions], "MB", sessions=count)
    for repl in sessions:
        repl.exec("x = 1")
    time.sleep(0.2)
    line("memory: PSS with its standby", [pss_mb(repl) for repl in sessions], "MB", sessions=count)
    for repl in sessions:
        repl.close()


def heap(repl: REPLProtocol, megabytes: int) -> None:
    """Small objects, the worst case for forks."""
    if megabytes:
        assert repl.exec(f"heap = [[n] for n in range({megabytes * 10_500})]").ok
    time.sleep(0.3)


def kills(rounds: int, megabytes: int) -> None:
    limits = Limits(time_seconds=0.1 if megabytes < 100 else 1.0, memory_mb=4 * megabytes + 256)
    with open_repl("jail", limits=Limits(memory_mb=limits.memory_mb, time_seconds=60)) as repl:
        heap(repl, megabytes)
        restored, following = [], []
        for _ in range(rounds):
            time.sleep(0.02 + megabytes / 2000)
            start = time.perf_counter()
            died = repl.exec("import os; os._exit(1)")
            restored.append(time.perf_counter() - start)
            assert died.state == "restored"
            following.append(seconds(lambda: repl.exec("y = 1")))
        line("kill: a cell that exits, restored", restored, "ms", 1e3, heap_mb=megabytes)
        line("kill: the next cell after it", following, "ms", 1e3, heap_mb=megabytes)
        if megabytes:
            return
        over = []
        for _ in range(rounds // 2):
            start = time.perf_counter()
            died = repl.exec("import itertools\nmax(itertools.count())", limits=Limits(time_seconds=0.1))
            over.append(time.perf_counter() - start - 0.1 - 0.25)
            assert died.state == "restored"
        line("kill: over the limit plus grace, restored", over, "ms", 1e3)


def copies(rounds: int, megabytes: int) -> None:
    with open_repl("jail", limits=Limits(memory_mb=4 * megabytes + 256, time_seconds=60)) as repl:
        assert isinstance(repl, SupportsFork)
        assert isinstance(repl, SupportsCheckpoint)
        heap(repl, megabytes)
        forks, points, backs = [], [], []
        for _ in range(rounds):
            time.sleep(0.02 + megabytes / 2000)
            start = time.perf_counter()
            copy = repl.fork()
            forks.append(time.perf_counter() - start)
            copy.close()
            repl.exec("z = 1")
            time.sleep(0.02 + megabytes / 2000)
            start = time.perf_counter()
            point = repl.checkpoint()
            points.append(time.perf_counter() - start)
            time.sleep(0.02 + megabytes / 2000)
            backs.append(seconds(lambda name=point: repl.restore(name)))  # type: ignore[misc]
        line("fork()", forks, "ms", 1e3, heap_mb=megabytes)
        line("checkpoint()", points, "ms", 1e3, heap_mb=megabytes)
        line("restore()", backs, "ms", 1e3, heap_mb=megabytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    print(json.dumps({"python": platform.python_version(), "kernel": platform.release(), "cores": os.cpu_count()}), flush=True)
    opening(rounds)
    memory(20)
    for megabytes in (0, 10, 64, 200):
        kills(rounds if megabytes < 100 else max(5, rounds // 6), megabytes)
    for megabytes in (0, 64):
        copies(max(5, rounds // 3), megabytes)


if __name__ == "__main__":
    main()
