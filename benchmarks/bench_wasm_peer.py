"""The wasm backend beside pyeryx, the other CPython in WebAssembly that runs in the host's process; one run, taking turns.

    pip install pyeryx; python benchmarks/bench_wasm_peer.py [--quick]

JSON lines: each figure once for both, and the ratio. Times are medians. Where pyeryx is not installed (it needs Python 3.12 or
newer) there is one line that says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))  # as `python benchmarks/...` does it; -m would not

from bench_wasm import KERNELS, private_mb, say

from rlm_sandbox import Limits, open_repl

_now = time.perf_counter
_LIMIT_SECONDS: Final = 0.5
#: Cells that must not end the process they run in.
DEEP: Final = {
    "json": "import json\njson.loads('[' * 200000)",
    "parentheses": "eval('(' * 5000 + ')' * 5000)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    return f()\nf()",
    "repr": "t = []\nfor _ in range(100_000):\n    t = [t]\nrepr(t)",
}


class Ours:
    """A session of the wasm backend. ``limit_seconds``: per cell."""

    def __init__(self, limit_seconds: float = 60.0) -> None:
        self._repl = open_repl("wasm", limits=Limits(time_seconds=limit_seconds, host_calls=None))
        self._repl.bind("f", lambda n: n)

    def run(self, code: str) -> str:
        """Run a cell; what it came to, and its output."""
        result = self._repl.exec(code)
        return result.stdout if result.ok else f"{result.outcome}, state {result.state}"

    def close(self) -> None:
        """The end of the session."""
        self._repl.close()


class Theirs:
    """The same with pyeryx."""

    def __init__(self, limit_seconds: float = 60.0) -> None:
        import eryx  # type: ignore[import-not-found, unused-ignore]

        registry = eryx.CallbackRegistry()

        def f(n: int) -> int:
            return n

        registry.callback(description="returns its argument")(f)
        self._session = eryx.Session(execution_timeout_ms=int(limit_seconds * 1000), callbacks=registry)

    def run(self, code: str) -> str:
        try:
            return str(self._session.execute(code).stdout_text)
        except Exception as exc:  # noqa: BLE001 - its errors have no common base that is documented
            return f"{type(exc).__name__}: {str(exc).splitlines()[0][:80] if str(exc) else ''}"

    def close(self) -> None:
        del self._session


BOTH: Final[dict[str, Callable[[float], Ours | Theirs]]] = {"ours": Ours, "pyeryx": Theirs}


def compare(name: str, unit: str, values: dict[str, list[float]], **more: Any) -> None:
    """One line: the medians and their ratio."""
    medians = {who: statistics.median(found) for who, found in values.items()}
    line = {who: round(found, 4) for who, found in medians.items()}
    ratio = medians["ours"] / medians["pyeryx"] if medians["pyeryx"] else None
    n = len(values["ours"])
    print(json.dumps({"name": name, "unit": unit, **line, "ratio": ratio and round(ratio, 3), "n": n, **more}), flush=True)


def timed(run: Callable[[], object]) -> float:
    started = _now()
    run()
    return (_now() - started) * 1e3


def starts(count: int) -> None:
    values: dict[str, list[float]] = {who: [] for who in BOTH}
    for _ in range(count):
        for who, make in BOTH.items():
            time.sleep(0.1)
            sessions = []
            values[who].append(timed(lambda: sessions.append(make(60.0)) or sessions[0].run("x = 1")))  # noqa: B023
            sessions[0].close()
    compare("session and first cell", "ms", values)


def turns(count: int) -> None:
    sessions = {who: make(60.0) for who, make in BOTH.items()}
    values: dict[str, list[float]] = {who: [] for who in BOTH}
    for _ in range(count):
        for who, session in sessions.items():
            values[who].append(timed(lambda: session.run("x=1")))  # noqa: B023
    compare("exec('x=1')", "ms", values)
    call = {"ours": "f(1)", "pyeryx": "await f(n=1)"}
    calls: dict[str, list[float]] = {who: [] for who in BOTH}
    for _ in range(5):
        for who, session in sessions.items():
            said = session.run(
                f"import time\nt = time.perf_counter()\nfor i in range(100):\n    {call[who]}\nprint(time.perf_counter() - t)"
            )
            calls[who].append(float(said) * 10)
    compare("host call", "ms", calls, note="100 in a loop")
    for session in sessions.values():
        session.close()


def kills(count: int) -> None:
    for name, code in {"loop": "while True:\n    pass", "sleep": "import time\ntime.sleep(30)"}.items():
        values: dict[str, list[float]] = {who: [] for who in BOTH}
        after = {}
        for _ in range(count):
            for who, make in BOTH.items():
                session = make(_LIMIT_SECONDS)
                session.run("kept = 42")
                values[who].append(timed(lambda: session.run(code)) - _LIMIT_SECONDS * 1e3)  # noqa: B023
                after[who] = session.run("print(kept)").strip()
                session.close()
        compare(f"killed and recovered, after its limit: {name}", "ms", values, next_cell=after)


def memory(count: int) -> None:
    values: dict[str, list[float]] = {}
    for who, make in BOTH.items():
        before = private_mb()
        sessions = [make(60.0) for _ in range(count)]
        for session in sessions:
            session.run("x = 1")
        after = private_mb()
        if before is None or after is None:
            return
        values[who] = [(after - before) / count]
        for session in sessions:
            session.close()
    compare(f"private memory of one of {count} sessions", "MB", values)


def speed(count: int) -> None:
    sessions = {who: make(120.0) for who, make in BOTH.items()}
    ratios = []
    for name, code in KERNELS.items():
        values: dict[str, list[float]] = {who: [] for who in BOTH}
        timer = f"import time\nsource = compile({code!r}, 'kernel', 'exec')\nt = time.perf_counter()\nexec(source, {{}})\nprint(time.perf_counter() - t)"
        for _ in range(count):
            for who, session in sessions.items():
                values[who].append(float(session.run(timer)) * 1e3)
        compare(f"kernel: {name}", "ms", values)
        ratios.append(statistics.median(values["ours"]) / statistics.median(values["pyeryx"]))
    print(
        json.dumps(
            {"name": "kernels, geometric mean", "unit": "times pyeryx", "ratio": round(statistics.geometric_mean(ratios), 3)}
        )
    )
    for session in sessions.values():
        session.close()


def survival() -> None:
    """Each deep cell in a process of its own, on its main thread: does the process live?"""
    for name, code in DEEP.items():
        line: dict[str, Any] = {"name": f"the host after a deep {name}", "unit": "exit status"}
        for who in BOTH:
            program = (
                f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport bench_wasm_peer as b\ns = b.BOTH[{who!r}](30.0)\n"
                f"s.run('x = 1')\nprint(s.run({code!r})[:60])\nprint(s.run('print(x)').strip()[:60])"
            )
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
            line[who] = done.returncode
            line[f"{who}_says"] = done.stdout.split("\n")[:2]
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    quick = parser.parse_args().quick
    try:
        found = version("pyeryx")
    except PackageNotFoundError:
        say("pyeryx", None, "ms", note="not installed (it needs Python 3.12 or newer): not compared")
        return
    print(json.dumps({"name": "versions", "pyeryx": found, "wasmtime": version("wasmtime"), "python": platform.python_version()}))
    for make in BOTH.values():  # each compiles or loads once
        session = make(60.0)
        session.run("x = 1")
        session.close()
    starts(5 if quick else 20)
    turns(100 if quick else 1_000)
    memory(5 if quick else 20)
    kills(1 if quick else 5)
    speed(1 if quick else 3)
    survival()


if __name__ == "__main__":
    main()
