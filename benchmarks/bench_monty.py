"""The `monty` backend beside its bare engine in the same run. One JSON line per figure, with all its parameters.

    python benchmarks/bench_monty.py [--rounds N] [--sessions N] [--check]

Bare and ours are measured in turns, one call of each after the other, so that a busy moment of the machine hits both.
The last lines are a table of the promised figures. ``--check`` exits with 1 if one of them is not met. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pydantic_monty as monty

from rlm_sandbox import Context, Limits, REPLProtocol, open_repl
from rlm_sandbox.backends.monty.launch import confined_launcher
from rlm_sandbox.options import MontyOptions

MANY = (1 << 31) - 1
CALLS = 200


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def in_turns(rounds: int, **acts: Callable[[], object]) -> dict[str, list[float]]:
    """``rounds`` measurements of each act, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():
        act()
    for _ in range(rounds):
        for name, act in acts.items():
            found[name].append(seconds(act))
    return found


class Report:
    """Writes the lines and remembers which promises were broken."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self._kept: list[tuple[str, ...]] = []

    def line(
        self,
        name: str,
        values: list[float],
        unit: str,
        scale: float,
        promise: float | None = None,
        bare: float | None = None,
        **parameters: Any,
    ) -> float:
        ordered = sorted(values)
        median = statistics.median(ordered) * scale
        line: dict[str, Any] = {
            "name": name,
            "median": round(median, 3),
            "p90": round(ordered[int(len(ordered) * 0.9)] * scale, 3),
            "unit": unit,
            "n": len(ordered),
            **parameters,
        }
        if bare is not None:
            line |= {
                "bare": round(bare, 3),
                "over_bare": round(median - bare, 3),
                "ratio": round(median / bare, 2) if bare else None,
            }
        if promise is not None:
            line |= {"promise": round(promise, 3), "of_promise": round(median / promise, 2), "kept": median <= promise}
            if median > promise:
                self.broken.append(name)
            how = ", ".join(f"{key}={value}" for key, value in parameters.items() if key in ("inline", "how", "limit", "code"))
            self._kept.append(
                (
                    f"{name} ({how})" if how else name,
                    f"{median:.3g} {unit}",
                    "-" if bare is None else f"{bare:.3g} {unit}",
                    f"{promise:.3g} {unit}",
                    f"{median / promise:.2f}",
                    "kept" if median <= promise else "BROKEN",
                )
            )
        print(json.dumps(line), flush=True)
        return median

    def summary(self) -> str:
        """Every promised figure: measured, bare, promised, and the share of the promise that it takes."""
        rows = [("figure", "measured", "bare", "promised", "share", ""), *self._kept]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


@contextlib.contextmanager
def bare_session(pool: monty.Monty) -> Iterator[monty.MontySession]:
    with pool.checkout(limits={"max_suspensions": MANY, "max_feed_duration_secs": 10.0, "max_memory": 512 << 20}) as session:
        yield session


def bare_calls(session: monty.MontySession, code: str) -> None:
    """A feed whose host calls are answered by snapshots, the only way that leaves the host in control of them."""
    snapshot: Any = session.feed_start(code)
    while not isinstance(snapshot, monty.MontyComplete):
        if isinstance(snapshot, monty.NameLookupSnapshot):
            snapshot = snapshot.resume(value=print)
        else:
            snapshot = snapshot.resume({"return_value": 1})


def bench_start(report: Report, rounds: int, pool: monty.Monty) -> None:
    """Opening a session while a spare worker waits, and, beside it, the engine's checkout of a waiting and of a new worker."""
    opened: list[float] = []
    fresh: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        repl = open_repl("monty")
        opened.append(time.perf_counter() - start)
        repl.exec("1")
        repl.close()
        time.sleep(0.15)  # the next spare worker is started meanwhile
    for _ in range(min(rounds, 20)):
        start = time.perf_counter()
        with open_repl("monty", options=MontyOptions(spare_workers=0)):
            fresh.append(time.perf_counter() - start)

    def checkout() -> None:
        with bare_session(pool):
            pass

    bare = report.line("bare checkout, worker used again", in_turns(rounds, bare=checkout)["bare"], "ms", 1e3)
    report.line("session start, warm", opened, "ms", 1e3, promise=1.0, bare=bare, spare_workers=1)
    report.line("session start, cold", fresh, "ms", 1e3, spare_workers=0)


def bench_exec(report: Report, rounds: int, pool: monty.Monty, *, recovery: bool) -> None:
    with bare_session(pool) as session, open_repl("monty", recovery=recovery) as repl:
        found = in_turns(rounds, bare=lambda: session.feed_run("x = 1"), ours=lambda: repl.exec("x = 1"))
        bare = report.line("bare exec", found["bare"], "us", 1e6, code="x = 1")
        promise = None if recovery else bare + 40.0
        report.line("exec", found["ours"], "us", 1e6, code="x = 1", recovery=recovery, promise=promise, bare=bare)


def bench_calls(report: Report, rounds: int, pool: monty.Monty, *, inline: bool, recovery: bool) -> None:
    code = f"for _ in range({CALLS}): f()"
    with bare_session(pool) as session, open_repl("monty", recovery=recovery) as repl:
        repl.bind("f", lambda: 1, inline=inline)
        found = in_turns(max(5, rounds // 5), bare=lambda: bare_calls(session, code), ours=lambda: repl.exec(code))
        each = {name: [value / CALLS for value in values] for name, values in found.items()}
        bare = report.line("bare host call", each["bare"], "us", 1e6, calls=CALLS, by="snapshots")
        report.line(
            "host call",
            each["ours"],
            "us",
            1e6,
            calls=CALLS,
            inline=inline,
            recovery=recovery,
            promise=None if recovery else bare + 40.0,
            bare=bare,
        )


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Size:
    """A host object for the bare engine: it holds the same text and is never copied either."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def size(self) -> int:
        return len(self.context)


def bench_context(report: Report, rounds: int, pool: monty.Monty) -> None:
    context = Context.from_text("0123456789abcdef\n" * (100_000_000 // 17))
    times: list[float] = []
    bare: list[float] = []
    grown = 0
    for _ in range(min(rounds, 20)):
        with bare_session(pool) as session:
            session.feed_run("1")
            inputs: dict[str, Any] = {"ctx": monty.ClassInstance(Size(context), allowed_methods={"size"})}
            bare.append(seconds(lambda session=session, inputs=inputs: session.feed_run("pass", inputs=inputs)))  # type: ignore[misc]
        with open_repl("monty") as repl:
            repl.exec("1")
            before = resident()
            times.append(seconds(lambda repl=repl: repl.bind("ctx", context)))  # type: ignore[misc]
            grown = max(grown, resident() - before)
            assert repl.exec("len(ctx)").value == str(len(context))
    median = report.line("bare engine, a host object bound", bare, "ms", 1e3)
    report.line("bind a context", times, "ms", 1e3, promise=5.0, bare=median, chars=len(context), host_memory_grew_bytes=grown)
    report.line("memory that binding a context takes", [grown], "MB", 1e-6, promise=10.0, chars=len(context))


def bare_overrun(pool: monty.Monty) -> float:
    """Seconds beyond its limit that the bare engine lets a loop run."""
    start = time.perf_counter()
    with contextlib.suppress(monty.MontyRuntimeError), pool.checkout(limits={"max_feed_duration_secs": 0.2}) as session:
        start = time.perf_counter()
        session.feed_run("while True: pass")
    return time.perf_counter() - start - 0.2


def bench_kill(report: Report, rounds: int, pool: monty.Monty) -> None:
    """How late a cell that loops ends, by the interpreter's own clock and by ours alone, and the restore after it."""
    bare = report.line("bare engine, a loop beyond its limit", [bare_overrun(pool) for _ in range(min(rounds, 20))], "ms", 1e3)
    for how, code in (("loop", "while True: pass"), ("sleep", "import time\ntime.sleep(60)")):
        late: list[float] = []
        total: list[float] = []
        with open_repl("monty", limits=Limits(time_seconds=0.2)) as repl:
            repl.set("x", list(range(100)))
            for _ in range(min(rounds, 20)):
                start = time.perf_counter()
                result = repl.exec(code)
                total.append(time.perf_counter() - start - 0.2)
                assert (result.outcome, result.state) == ("limit", "restored"), result
                late.append((result.usage.wall_seconds or 0.0) - 0.2)
        parameters: dict[str, Any] = {"how": how, "limit": "time_seconds", "limit_seconds": 0.2}
        report.line("kill after the limit", late, "ms", 1e3, promise=50.0, bare=bare if how == "loop" else None, **parameters)
        report.line("kill and restore after the limit", total, "ms", 1e3, **parameters)
    late = []
    with open_repl("monty", limits=Limits(time_seconds=5)) as repl:
        for _ in range(min(rounds, 20)):
            result = repl.exec("while True: pass", limits=Limits(wall_seconds=0.2))
            late.append((result.usage.wall_seconds or 0.0) - 0.2)
    report.line(
        "kill after the limit", late, "ms", 1e3, promise=50.0, bare=bare, how="loop", limit="wall_seconds", limit_seconds=0.2
    )


def bench_many(report: Report, count: int) -> None:
    """Sessions beyond the workers: what a parked one costs, in memory and in the time of its next call."""
    options = MontyOptions(max_processes=4)
    with contextlib.ExitStack() as stack:
        before = resident()
        repls: list[REPLProtocol] = []
        opened: list[float] = []
        for number in range(count):
            start = time.perf_counter()
            repl = stack.enter_context(open_repl("monty", options=options))
            repl.set("x", number)
            opened.append(time.perf_counter() - start)
            repls.append(repl)
        grown = resident() - before
        chosen = range(0, count, max(1, count // 100))
        times = [seconds(lambda number=number: wake(repls[number], number)) for number in chosen]  # type: ignore[misc]
    parameters: dict[str, Any] = {"sessions": count, "workers": 4}
    report.line("open one more session, parking another", opened, "ms", 1e3, **parameters)
    report.line("call on a parked session", times, "ms", 1e3, host_bytes_per_session=grown // count, **parameters)


def wake(repl: REPLProtocol, number: int) -> None:
    assert repl.exec("x").value == str(number)


def bench_copies(report: Report, rounds: int) -> None:
    with open_repl("monty") as repl:
        repl.set("x", list(range(1000)))
        keys: list[str] = []
        made = in_turns(rounds, ours=lambda: keys.append(repl.checkpoint()))["ours"]  # type: ignore[attr-defined]
        report.line("checkpoint", made, "us", 1e6)
        report.line("restore a checkpoint", in_turns(10, ours=lambda: repl.restore(keys[-1]))["ours"], "ms", 1e3)  # type: ignore[attr-defined]
        report.line("fork", in_turns(10, ours=lambda: repl.fork().close())["ours"], "ms", 1e3)  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=2_000, help="sessions of the parking benchmark, a minute a thousand")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise is broken")
    chosen = parser.parse_args()
    machine = {
        "python": platform.python_version(), "cpus": os.cpu_count(), "kernel": platform.release(), "load": os.getloadavg()[0],
        "engine": version("pydantic-monty"), "rlm_sandbox": version("rlm-sandbox"), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps({"name": "machine", **machine}), flush=True)
    report = Report()
    # The bare engine's workers are confined too: the figure is what the library adds.
    with monty.Monty(binary_path=confined_launcher().path, min_processes=2, max_processes=8) as pool:
        bench_start(report, chosen.rounds, pool)
        for recovery in (False, True):
            bench_exec(report, chosen.rounds * 5, pool, recovery=recovery)
        bench_calls(report, chosen.rounds, pool, inline=False, recovery=False)
        bench_calls(report, chosen.rounds, pool, inline=True, recovery=False)
        bench_calls(report, chosen.rounds, pool, inline=False, recovery=True)
        bench_context(report, chosen.rounds, pool)
        bench_kill(report, chosen.rounds, pool)
    bench_copies(report, chosen.rounds)
    bench_many(report, chosen.sessions)
    print(report.summary(), flush=True)
    if report.broken:
        print(f"not kept: {', '.join(dict.fromkeys(report.broken))}", file=sys.stderr)
    return 1 if chosen.check and report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
