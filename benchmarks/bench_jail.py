"""The figures of the jail: each with its target, whether it holds, and the same thing on the peers, measured in the same run.

    python benchmarks/bench_jail.py [--json] [--check] [--quick] [--only PART[,PART]]

Peers: a plain process with a JSON pipe (json_pipe.py), the same inside bubblewrap, and pydantic-monty. Figures that are compared
are measured in turns, one call of each after the other, so that a busy moment of the machine hits all of them; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
from json_pipe import JsonPipe

from rlm_sandbox import Context, Limits, REPLProtocol, SessionPool, open_repl
from rlm_sandbox.adapters import FakeAdapter
from rlm_sandbox.orchestrator import RLM, Policy
from rlm_sandbox.orchestrator.llm import Completion

now: Final = time.perf_counter
US: Final = 1e6
MS: Final = 1e3
BWRAP: Final = ("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev")
GRACE: Final = 0.25
#: One long call in C, which does not look at signals.
STUBBORN: Final = "import itertools\nmax(itertools.count())"
_ECHO: Final = """
import os, socket
sock = socket.socket(fileno=int(os.environ["ECHO_FD"]))
while data := sock.recv(4096):
    sock.send(data)
"""


@dataclass
class Report:
    """Prints the figures and remembers which targets were missed."""

    as_json: bool
    missed: list[str] = field(default_factory=list)

    def say(
        self, name: str, values: list[float], unit: str, scale: float = 1.0, *, target: float | None = None, **parameters: Any
    ) -> float:
        """One figure. ``target``: the largest median that holds, in ``unit``. The median."""
        ordered = sorted(value * scale for value in values)
        median = statistics.median(ordered)
        line: dict[str, Any] = {"name": name, "median": round(median, 3), "p90": round(ordered[int(len(ordered) * 0.9)], 3)}
        line |= {"unit": unit, "n": len(ordered), **parameters}
        if target is not None:
            line |= {"target": round(target, 3), "holds": median <= target}
            if median > target:
                self.missed.append(name)
        if self.as_json:
            print(json.dumps(line), flush=True)
            return median
        verdict = "" if target is None else f"   target {target:,.3g}: {'holds' if median <= target else 'DOES NOT HOLD'}"
        rest = ", ".join(f"{key}={value}" for key, value in parameters.items())
        print(f"{name:58} {median:10,.3f} {unit:6} (p90 {line['p90']:,.3f}, n {len(ordered)}){verdict}  {rest}", flush=True)
        return median


def seconds(act: Callable[[], object]) -> float:
    start = now()
    act()
    return now() - start


def in_turns(rounds: int, acts: dict[str, Callable[[], object]], *, gap: float = 0.0) -> dict[str, list[float]]:
    """``rounds`` measurements of each act, interleaved, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():
        act()
    for _ in range(rounds):
        for name, act in acts.items():
            if gap:
                time.sleep(gap)
            found[name].append(seconds(act))
    return found


@contextlib.contextmanager
def raw_echo() -> Iterator[Callable[[], object]]:
    """A bare round trip of 64 bytes to a Python process over a socket pair."""
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen([sys.executable, "-I", "-S", "-c", _ECHO], pass_fds=[theirs.fileno()], env={"ECHO_FD": str(theirs.fileno())}) as child:  # fmt: skip
        theirs.close()

        def round_trip() -> None:
            ours.send(b"x" * 64)
            ours.recv(4096)

        yield round_trip
        ours.shutdown(socket.SHUT_RDWR)
        child.wait()


def peers() -> dict[str, tuple[str, ...]]:
    """The pipes that can be measured here, by name."""
    found: dict[str, tuple[str, ...]] = {"plain pipe": ()}
    if shutil.which("bwrap"):
        found["bubblewrap pipe"] = BWRAP
    else:
        print("bubblewrap is not installed, so it is not measured: apt install bubblewrap", file=sys.stderr)
    return found


@contextlib.contextmanager
def pipes() -> Iterator[dict[str, JsonPipe]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for name, prefix in peers().items():
            pipe = JsonPipe(prefix)
            stack.callback(pipe.kill)
            found[name] = pipe
        yield found


def monty_session(stack: contextlib.ExitStack) -> Any:
    """A session of pydantic-monty, or None where it is not installed."""
    try:
        import pydantic_monty
    except ImportError:
        print("pydantic-monty is not installed, so it is not measured: pip install pydantic-monty", file=sys.stderr)
        return None
    pool = stack.enter_context(pydantic_monty.Monty(min_processes=2, max_processes=8))
    return pool, stack.enter_context(pool.checkout())


# ---- the parts


def start(report: Report, rounds: int) -> None:
    """From nothing to a session that has answered its first cell."""
    rounds = min(rounds, 60)
    plain = peers()

    measured: dict[str, list[float]] = {
        name: [] for name in ("cold open", "cold open and first cell", "hit", "hit and first cell", "monty", *plain)
    }
    with SessionPool("jail", size=4, ready=4) as pool, contextlib.ExitStack() as stack:
        monty = monty_session(stack)
        open_repl("jail").close()
        for _ in range(rounds):
            time.sleep(0.08)  # the pool has filled: what it opens beside an opening without it would be measured, too
            begin = now()
            with open_repl("jail") as repl:
                measured["cold open"].append(now() - begin)
                repl.exec("x = 1")
                measured["cold open and first cell"].append(now() - begin)
            for name in plain:
                begin = now()
                one = JsonPipe(plain[name])
                one.exec("x = 1")
                measured[name].append(now() - begin)
                one.kill()
            time.sleep(0.08)  # the pool fills
            begin = now()
            with pool.open_repl() as repl:
                measured["hit"].append(now() - begin)
                repl.exec("x = 1")
                measured["hit and first cell"].append(now() - begin)
            if monty is not None:
                begin = now()
                with monty[0].checkout() as session:
                    session.feed_run("x = 1")
                    measured["monty"].append(now() - begin)
    for name in plain:
        report.say(f"start and first cell, {name}", measured[name], "ms", MS)
    if measured["monty"]:
        report.say("start and first cell, monty (worker used again)", measured["monty"], "ms", MS)
    third = statistics.median(measured["bubblewrap pipe"]) * MS / 3 if "bubblewrap pipe" in measured else None
    report.say("session, pool hit", measured["hit"], "ms", MS, target=0.3)
    report.say("session, no pool", measured["cold open"], "ms", MS, target=5.0)
    report.say("session and first cell, pool hit: 3 times bubblewrap", measured["hit and first cell"], "ms", MS, target=third)
    report.say("session and first cell, no pool: 3 times bubblewrap", measured["cold open and first cell"], "ms", MS, target=third)


def turns(report: Report, rounds: int) -> None:
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(raw_echo())
        naive = stack.enter_context(pipes())
        monty = monty_session(stack)
        bare = stack.enter_context(open_repl("jail", recovery=False))
        safe = stack.enter_context(open_repl("jail"))
        # In a row, each alone: a loop without pauses. In turns the processes between cost each other their caches.
        acts: dict[str, Callable[[], object]] = {"raw round trip": raw}
        acts |= {name: (lambda pipe=pipe: pipe.exec("x=1")) for name, pipe in naive.items()}  # type: ignore[misc]
        if monty is not None:
            acts["monty"] = lambda: monty[1].feed_run("x=1")
        acts["jail, recovery=False"] = lambda: bare.exec("x=1")
        found: dict[str, list[float]] = {name: [] for name in acts}
        for _ in range(10):
            for name, act in acts.items():
                for _ in range(20):
                    act()
                found[name] += [seconds(act) for _ in range(rounds)]
        base = report.say("back to back: raw round trip", found["raw round trip"], "us", US)
        for name, values in found.items():
            if name != "raw round trip":
                target = base + 40 if name.startswith("jail") else None
                report.say(f'exec("x=1") back to back, {name}', values, "us", US, target=target)
        found = in_turns(rounds, acts)
        base = report.say("in turns: raw round trip", found["raw round trip"], "us", US)
        for name, values in found.items():
            if name != "raw round trip":
                report.say(f'exec("x=1") in turns, {name}', values, "us", US)
        report.say(
            'exec("x=1") back to back, jail with recovery', [seconds(lambda: safe.exec("x=1")) for _ in range(rounds)], "us", US
        )
        acts["jail, recovery=True"] = lambda: safe.exec("x=1")
        found = in_turns(max(20, rounds // 5), acts, gap=0.01)
        for name, values in found.items():
            target = 200.0 if name == "jail, recovery=True" else None
            report.say(f"10 ms apart: {name}", values, "us", US, target=target)


def calls(report: Report, rounds: int) -> None:
    count = 300
    with contextlib.ExitStack() as stack:
        naive = stack.enter_context(pipes())
        found: dict[str, list[float]] = {}
        for recovery in (False, True):
            repl = stack.enter_context(open_repl("jail", limits=Limits(host_calls=None), recovery=recovery))
            repl.bind("f", lambda value: value, inline=True)
            repl.bind("g", lambda value: value)
            acts: dict[str, Callable[[], object]] = {
                f"{name} pipe": lambda pipe=pipe: pipe.exec(f"for i in range({count}): f(i)")  # type: ignore[misc]
                for name, pipe in naive.items()
            }
            acts["inline"] = lambda repl=repl: repl.exec(f"for i in range({count}): f(i)")  # type: ignore[misc]
            acts["on the host pool"] = lambda repl=repl: repl.exec(f"for i in range({count}): g(i)")  # type: ignore[misc]
            found = in_turns(max(9, rounds // 10), acts)
            base = 0.0
            for name, values in found.items():
                each = [value / count for value in values]
                if name == "plain pipe pipe":
                    base = report.say("host call, plain pipe", each, "us", US)
                elif name.endswith(" pipe"):
                    report.say(f"host call, {name.removesuffix(' pipe')}", each, "us", US)
                else:
                    report.say(
                        f"host call, jail, {name}",
                        each,
                        "us",
                        US,
                        target=1.5 * base if name == "inline" else None,
                        recovery=recovery,
                    )


class _SlowAdapter:
    """A model that takes 100 ms for each answer."""

    model = "slow"

    def complete(self, messages: Any, **_options: Any) -> Completion:
        time.sleep(0.1)
        return Completion("yes")


def batch(report: Report, rounds: int) -> None:
    cell = """
import time
from concurrent.futures import ThreadPoolExecutor
found = []
for _ in range(5):
    start = time.perf_counter()
    assert llm_batch([f"question {i}" for i in range(32)]) == ["yes"] * 32
    middle = time.perf_counter()
    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(llm_query, [f"question {i}" for i in range(32)])) == ["yes"] * 32
    found.append((middle - start, time.perf_counter() - middle))
FINAL(repr(found))
"""
    policy = Policy(max_concurrent_subcalls=32, max_subcalls=1000)
    pairs: list[tuple[float, float]] = []
    for _ in range(max(1, min(3, rounds // 50))):
        model = FakeAdapter([f"```python\n{cell}\n```"] * 2)
        rlm = RLM(model, repl_backend="jail", policy=policy, subcall_adapter=_SlowAdapter())
        answer, _ = rlm.run("how long does it take?", "a text")
        pairs += json.loads(re.sub(r"[()]", lambda m: "[" if m[0] == "(" else "]", answer))
    report.say("llm_batch of 32 calls of 100 ms", [pair[0] for pair in pairs], "ms", MS, target=130.0)
    report.say("ThreadPoolExecutor(32).map(llm_query, ...), the same", [pair[1] for pair in pairs], "ms", MS, target=130.0)


def status_kb(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def contexts(report: Report, rounds: int) -> None:
    text = "0123456789abcdef lorem ipsum dolor sit amet, consectetur adipisci\n" * (100_000_000 // 66)
    contexts = {"100 MB": Context.from_text(text)}
    contexts["1 GB"] = Context.from_text(text * 10)
    for name, context in contexts.items():
        report.say(f"storing a context of {name}, once", [seconds(context.memory_file)], "ms", MS)
    attach: dict[str, list[float]] = {name: [] for name in contexts}
    grown: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(max(7, min(30, rounds // 10))):
        for name, context in contexts.items():
            with open_repl("jail", recovery=False) as repl:
                worker = _workers(repl)[-1]
                before = status_kb(worker.pid, "RssAnon:")
                attach[name].append(seconds(lambda repl=repl, context=context: repl.bind("ctx", context)))  # type: ignore[misc]
                assert repl.exec("len(ctx)").value == str(len(context))
                grown[name].append((status_kb(worker.pid, "RssAnon:") - before) / 1024)
    medians = [report.say(f"attach {name}", values, "ms", MS, target=1.0) for name, values in attach.items()]
    report.say("attach 1 GB beside 100 MB", [medians[1] / medians[0]], "times", target=1.3)
    for name, values in grown.items():
        report.say(f"RssAnon added by attaching {name} and a first cell", values, "MB", target=1.0)
    contexts.pop("1 GB")
    with contextlib.ExitStack() as stack:
        for name, pipe in stack.enter_context(pipes()).items():
            report.say(f"putting 100 MB, {name}", [seconds(lambda pipe=pipe: pipe.exec("result = len(t)", t=text))], "ms", MS)  # type: ignore[misc]
        monty = monty_session(stack)
        if monty is not None:
            report.say("putting 100 MB, monty", [seconds(lambda: monty[1].feed_run("len(t)", inputs={"t": text}))], "ms", MS)
    with open_repl("jail", recovery=False) as repl:
        repl.bind("ctx", contexts["100 MB"])
        # Absent, so that the whole text is searched, in both processes by the same interpreter.
        cell = "import time\ndef t():\n    s = time.perf_counter(); ctx.find('needle'); return time.perf_counter() - s\n"
        first = repl.exec(cell + "t()").value
        report.say("ctx.find over 100 MB, first touch of the pages", [float(first or 0)], "ms", MS)
        found = in_turns(9, {"guest": lambda: repl.exec("last = t()"), "host": lambda: text.find("needle")})
        guest = []
        for _ in range(9):
            guest.append(float(repl.exec("t()").value or 0))
            found["host"].append(seconds(lambda: text.find("needle")))
        host = report.say("str.find over 100 MB, this process", found["host"], "ms", MS)
        report.say("ctx.find over 100 MB", guest, "ms", MS, target=1.3 * host)


def cpu(report: Report, rounds: int) -> None:
    from bench_wasm import KERNELS

    wrapper = "import time\n_s = time.perf_counter()\n{}\nresult = time.perf_counter() - _s"
    ratios = []
    with JsonPipeSession() as outside, open_repl("jail", limits=Limits(time_seconds=60, memory_mb=2048), recovery=False) as repl:
        for name, code in KERNELS.items():
            cell = wrapper.format(code)
            pairs = []
            for _ in range(max(3, min(9, rounds // 30))):
                result = repl.exec(cell, read=("result",))
                assert result.ok, result
                pairs.append(result.read["result"] / outside.exec(cell))
            ratios.append(report.say(f"CPU time inside / outside: {name}", pairs, "times"))
    report.say("CPU time inside / outside, median of the kernels", ratios, "times", target=1.05)


@contextlib.contextmanager
def JsonPipeSession() -> Iterator[JsonPipe]:  # noqa: N802 - stands for the class
    pipe = JsonPipe()
    try:
        yield pipe
    finally:
        pipe.kill()


def _workers(repl: REPLProtocol) -> list[psutil.Process]:
    """The processes that came with the last session: supervisor, worker, and a standby if there is one."""
    children = psutil.Process().children(recursive=True)
    newest = max(child.create_time() for child in children)
    return sorted((child for child in children if child.create_time() > newest - 1.0), key=lambda child: child.pid)


def pss_mb(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return total


def memory(report: Report, rounds: int) -> None:
    count = 20
    open_repl("jail").close()
    time.sleep(0.3)
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def ours() -> list[psutil.Process]:
        return [child for child in psutil.Process().children(recursive=True) if child.pid not in before]

    with contextlib.ExitStack() as stack:
        repls = [stack.enter_context(open_repl("jail")) for _ in range(count)]
        report.say("PSS of a session that waits", [pss_mb(ours()) / count], "MB", target=3.0, sessions=count)
        for repl in repls:
            repl.exec("x = 1")
        time.sleep(0.5)
        report.say(
            "PSS of a session with its standby, after a cell", [pss_mb(ours()) / count], "MB", target=4.5, sessions=count,
            processes=len(ours()) / count,
        )  # fmt: skip
    with pipes() as naive:
        for name, pipe in naive.items():
            pipe.exec("x = 1")
            family = [psutil.Process(pipe.process.pid), *psutil.Process(pipe.process.pid).children(recursive=True)]
            report.say(f"PSS of one, {name}", [pss_mb(family)], "MB")


def kill(report: Report, rounds: int) -> None:
    rounds = max(5, min(20, rounds // 15))
    for recovery in (False, True):
        late: list[float] = []
        with open_repl("jail", limits=Limits(time_seconds=0.2), recovery=recovery) as repl:
            for _ in range(rounds):
                repl.exec("x = 1")
                time.sleep(0.02)
                late.append(seconds(lambda repl=repl: repl.exec(STUBBORN)) - 0.2 - GRACE)  # type: ignore[misc]
        report.say(
            "kill of a cell that ignores the interrupt, after limit and grace, with the new state",
            late,
            "ms",
            MS,
            target=20.0,
            recovery=recovery,
        )
    late = []
    with open_repl("jail", limits=Limits(time_seconds=0.2)) as repl:
        for _ in range(rounds):
            late.append(seconds(lambda repl=repl: repl.exec("while True: pass")) - 0.2)  # type: ignore[misc]
    report.say("end of a cell that obeys the interrupt, after the limit (kept)", late, "ms", MS)


def heap(mb: int) -> str:
    return f"x = [i + 0.5 for i in range({mb * 32768})]\nlen(x)"


def recovery(report: Report, rounds: int) -> None:
    """What the recovery of small objects costs at each size: 32 bytes each, so 1 GB is 33 million of them."""
    limits = Limits(memory_mb=3000, time_seconds=120, wall_seconds=300)
    for mb in (1, 10, 64, 200, 1000):
        take, following, ready = [], [], []
        with open_repl("jail", limits=limits) as repl:
            repl.exec(heap(mb))
            for _ in range(max(3, min(15, rounds // 10)) if mb < 500 else 3):
                repl.exec("y = 1")
                time.sleep(0.05 + mb / 4000)
                begin = now()
                result = repl.exec("import os\nos.kill(os.getpid(), 9)")
                take.append(now() - begin)
                following.append(seconds(lambda repl=repl: repl.exec("len(x)")))  # type: ignore[misc]
                assert (result.state, result.outcome) == ("restored", "crashed"), result
            for _ in range(5 if mb < 500 else 3):
                repl.exec("y = 1")
                ready.append(seconds(lambda repl=repl: repl.exec("y = 1")))  # type: ignore[misc]
        both = [a + b for a, b in zip(take, following, strict=True)]
        report.say(f"killed, restored, next cell: {mb} MB of small objects", both, "ms", MS, target=5.0 if mb <= 64 else None)
        report.say(f"    of it the take-over, {mb} MB", take, "ms", MS)
        report.say(f"    of it the next cell, {mb} MB", following, "ms", MS)
        report.say(f"    a cell back to back (waits for the standby), {mb} MB", ready, "ms", MS)
    times: dict[bool, list[float]] = {}
    for with_standby in (False, True):
        times[with_standby] = []
        with open_repl("jail", limits=limits, recovery=with_standby) as repl:
            repl.exec(heap(200))
            for _ in range(5):
                time.sleep(0.15)
                times[with_standby].append(
                    float(repl.exec("import time\ns = time.perf_counter(); sum(x); time.perf_counter() - s").value or 0)
                )
    cost = (statistics.median(times[True]) - statistics.median(times[False])) / 2
    report.say(
        "copy-on-write of 100 MB touched in the cell after a standby",
        [cost],
        "ms",
        MS,
        bare_ms=round(statistics.median(times[False]) * MS / 2, 2),
    )


PARTS: Final[dict[str, Callable[[Report, int], None]]] = {
    "start": start, "turns": turns, "calls": calls, "batch": batch, "contexts": contexts, "cpu": cpu, "memory": memory, "kill": kill,
    "recovery": recovery,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON lines, for machines")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of: {', '.join(PARTS)}")
    chosen = parser.parse_args()
    report = Report(chosen.json)
    machine = {
        "python": platform.python_version(), "cpus": os.cpu_count(), "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 1), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps({"name": "machine", **machine}) if chosen.json else f"{machine}", flush=True)
    for part in chosen.only.split(","):
        gc.collect()
        PARTS[part](report, 60 if chosen.quick else 300)
    if report.missed:
        print(f"missed: {', '.join(report.missed)}", file=sys.stderr)
    return 1 if chosen.check and report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
