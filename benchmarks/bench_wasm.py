"""The figures of the wasm backend, as JSON lines: start, turns, memory, kills, recovery, and its speed beside plain CPython.

    python benchmarks/bench_wasm.py [--quick]

Each line has its unit, its count and its target; everything is measured in this run, on this machine. Times are medians. A
machine that does other work meanwhile shows it: the load is in the first line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rlm_sandbox import Limits, open_repl

_now = time.perf_counter

#: Kernels for the CPU ratio: ordinary Python, run in a guest and here.
KERNELS: Final = {
    "loop": "n = 0\nfor i in range(1_000_000):\n    n += i & 7",
    "calls": "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\nfib(22)",
    "objects": "class P:\n    def __init__(self, x):\n        self.x = x\nsum(p.x for p in [P(i) for i in range(100_000)])",
    "json": "import json\nd = json.dumps([{'a': i, 'b': [1, 2, 'x']} for i in range(20_000)])\nlen(json.loads(d))",
    "regex": "import re\nt = 'alpha beta 12345 gamma ' * 40_000\nlen(re.findall(r'\\d+', t))",
    "find": "t = 'x' * 20_000_000 + 'needle'\nt.find('needle')",
    "split": "t = 'one two three four ' * 100_000\nlen(t.split())",
    "count": "from collections import Counter\nt = 'one two three four ' * 50_000\nCounter(t.split())['two']",
    "sort": "import random\nrandom.seed(1)\nlen(sorted([random.random() for _ in range(100_000)]))",
    "bigint": "len(str(3 ** 60_000 * 7 ** 50_000 % 10 ** 4000))",
}


def say(name: str, value: float | None, unit: str, *, target: float | None = None, n: int = 1, **more: Any) -> None:
    line: dict[str, Any] = {"name": name, "value": None if value is None else round(value, 4), "unit": unit, "n": n}
    if target is not None and value is not None:
        line |= {"target": target, "met": value <= target}
    print(json.dumps(line | more), flush=True)


def median_of(count: int, run: Callable[[], object]) -> float:
    times = []
    for _ in range(count):
        started = _now()
        run()
        times.append(_now() - started)
    return statistics.median(times)


def private_mb() -> float | None:
    """Memory that is this process's alone."""
    path = Path("/proc/self/smaps_rollup")
    if not path.exists():
        return None
    sizes = [line.split() for line in path.read_text().splitlines()]
    return sum(int(fields[1]) for fields in sizes if fields[0] in ("Private_Dirty:", "Private_Clean:")) / 1024


def starts(count: int) -> None:
    opened, first = [], []
    for _ in range(count):
        time.sleep(0.15)  # the pool fills
        started = _now()
        with open_repl("wasm") as session:
            opened.append(_now() - started)
            session.exec("x = 1")
            first.append(_now() - started)
    say("open, pool hit", statistics.median(opened) * 1e3, "ms", target=0.5, n=count)
    say("open and first cell, pool hit", statistics.median(first) * 1e3, "ms", n=count)


def many(count: int) -> None:
    before = private_mb()
    started = _now()
    sessions = [open_repl("wasm") for _ in range(count)]
    for session in sessions:
        session.exec("x = 1")
    took = _now() - started
    after = private_mb()
    say(f"{count} sessions with a cell each", took, "s", target=1.5 * count / 100, n=count)
    say("one of them, cold", took / count * 1e3, "ms", target=10, n=count)
    if before is not None and after is not None:
        say("private memory of one", (after - before) / count, "MB", target=3, n=count)
    for session in sessions:
        session.close()


def turns(count: int) -> None:
    with open_repl("wasm", limits=Limits(host_calls=None)) as session:
        session.exec("x = 1")
        say("exec('x=1')", median_of(count, lambda: session.exec("x=1")) * 1e3, "ms", target=0.15, n=count)
        session.bind("f", lambda n: n)
        session.bind("g", lambda n: n, inline=True)
        for name, label in (("f", "host call"), ("g", "host call, inline")):
            code = (
                f"import time\ntimes = []\nfor i in range({count}):\n    t = time.perf_counter()\n    {name}(i)\n"
                "    times.append(time.perf_counter() - t)"
            )
            session.exec(code)
            say(label, statistics.median(session.get("times")) * 1e3, "ms", target=0.15, n=count)


def kills(count: int) -> None:
    limit = 0.5
    cells = {
        "loop": "while True:\n    pass",
        "swallow": "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "regex": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
        "sleep": "import time\ntime.sleep(60)",
        "power": "3 ** (10 ** 8)",
    }
    with open_repl("wasm", limits=Limits(time_seconds=limit)) as session:
        for n in range(10):
            session.exec(f"a{n} = [i for i in range(100)]")
        for name, code in cells.items():
            over, recovery = [], []
            for _ in range(count):
                started = _now()
                result = session.exec(code)
                ended = _now()
                assert result.outcome == "limit", result
                assert result.state == "restored", result
                assert result.usage.wall_seconds is not None
                assert result.usage.time_seconds is not None
                over.append(result.usage.time_seconds - limit)
                recovery.append(ended - started - result.usage.time_seconds)
            say(f"killed after its limit: {name}", statistics.median(over) * 1e3, "ms", target=100, n=count)
            say(f"restored from ten cells: {name}", statistics.median(recovery) * 1e3, "ms", target=50, n=count)


def recoveries(count: int) -> None:
    """After ten cells and after a hundred, in turns; with a moment between the cells, though a far shorter one than a model takes."""
    took: dict[int, list[float]] = {10: [], 100: []}
    for _ in range(count):
        for cells, times in took.items():
            with open_repl("wasm") as session:
                for n in range(cells):
                    assert session.exec(f"def f{n}(x):\n    return x + {n}\nv{n} = [f{n}(i) for i in range(100)]").ok
                    time.sleep(0.03)
                time.sleep(0.1)
                started = _now()
                result = session.exec("import os\nos._exit(1)")
                times.append(_now() - started)
                assert result.state == "restored"
                assert session.exec(f"v0[1], v{cells - 1}[1]").value == f"(1, {cells})"
    for cells, times in took.items():
        say(f"restored from {cells} cells", statistics.median(times) * 1e3, "ms", target=50, n=count)
    say("the hundredth, of the tenth", statistics.median(took[100]) / statistics.median(took[10]), "times", n=count, ideal=1)


def parallel() -> None:
    """Two sessions in two threads, beside one after the other: the interpreter lock is free while a guest computes."""
    cell = "n = 0\nfor i in range(3_000_000):\n    n += i & 7"
    with open_repl("wasm") as one, open_repl("wasm") as other:
        ratios = []
        for _ in range(5):
            together = [threading.Thread(target=session.exec, args=(cell,)) for session in (one, other)]
            started = _now()
            for session in (one, other):
                session.exec(cell)
            in_turn = _now() - started
            started = _now()
            for thread in together:
                thread.start()
            for thread in together:
                thread.join()
            ratios.append((_now() - started) / in_turn)
    say("two sessions at once, of their time in turn", statistics.median(ratios), "times", n=5, ideal=0.5)


def speed(count: int) -> None:
    ratios = []
    with open_repl("wasm", limits=Limits(time_seconds=120)) as session:
        for name, code in KERNELS.items():
            compiled = compile(code, name, "exec")
            here = min(_timed(lambda: exec(compiled, {})) for _ in range(count))  # noqa: B023, S102 - our own kernels
            wrapped = "import time\nsource = compile(" + repr(code) + ", 'kernel', 'exec')\n"
            wrapped += f"best = 1e9\nfor _ in range({count}):\n    t = time.perf_counter()\n    exec(source, {{}})\n    best = min(best, time.perf_counter() - t)"
            assert session.exec(wrapped).ok
            there = session.get("best")
            ratios.append(there / here)
            say(f"CPU ratio to CPython {platform.python_version()}: {name}", there / here, "times", n=count)
    say("CPU ratio, geometric mean", statistics.geometric_mean(ratios), "times", n=len(ratios))


def _timed(run: Callable[[], object]) -> float:
    started = _now()
    run()
    return _now() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    quick = parser.parse_args().quick
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    say("load before", load, "processes", cpus=os.cpu_count(), python=platform.python_version(), machine=platform.machine())
    started = _now()
    with open_repl("wasm") as session:
        session.exec("x = 1")
    say("first session of the process", (_now() - started) * 1e3, "ms")
    starts(5 if quick else 20)
    turns(200 if quick else 2_000)
    many(20 if quick else 100)
    kills(2 if quick else 5)
    recoveries(2 if quick else 10)
    parallel()
    speed(2 if quick else 5)


if __name__ == "__main__":
    main()
