"""The workers of the monty backend: how they are confined, how few of them serve many sessions, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlm_sandbox import (
    Context,
    GuestCrashed,
    Limits,
    PoolTimeout,
    REPLProtocol,
    SupportsCheckpoint,
    SupportsFork,
    open_repl,
)
from rlm_sandbox.options import MontyOptions
from rlm_sandbox.registry import Availability

from ..conftest import require_usable, variant_state


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    require_usable("monty", variant_state("monty"))


def worker_pid(repl: REPLProtocol) -> int:
    pid = repl._interpreter.worker.pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def gone(pid: int, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


# ---- confinement, seen from outside


def test_a_worker_has_no_privileges_and_a_filter() -> None:
    with open_repl("monty") as repl:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{worker_pid(repl)}/status").read_text().splitlines())
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    if os.geteuid() == 0:
        assert "0" not in status["Uid"].split(), "never the host's root"


def test_a_worker_has_namespaces_of_its_own() -> None:
    with open_repl("monty") as repl:
        for kind in ("user", "mnt", "net", "ipc", "uts"):
            assert Path(f"/proc/{worker_pid(repl)}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink(), kind


def test_a_worker_sees_no_file_of_the_host_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-123")
    with open_repl("monty") as repl:
        pid = worker_pid(repl)
        maps = Path(f"/proc/{pid}/maps").read_text()
        mapped = {line.split(None, 5)[5] for line in maps.splitlines() if len(line.split(None, 5)) == 6}
        assert Path(f"/proc/{pid}/environ").read_bytes() == b""
        assert sys.prefix not in Path(f"/proc/{pid}/cmdline").read_text()
        mounts = {line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()}
    assert all(path.startswith(("/lib/", "/bin/engine", "[")) for path in mapped if path.startswith(("/", "["))), mapped
    assert all(point == "/" or point.startswith(("/lib/", "/bin/engine")) for point in mounts), mounts


def test_the_language_alone_has_to_be_asked_for() -> None:
    with open_repl("monty", options=MontyOptions(confinement="language")) as repl:
        assert "no seccomp" in repl.capabilities.isolation
        assert "Seccomp:\t0" in Path(f"/proc/{worker_pid(repl)}/status").read_text()
        assert repl.exec("1 + 1").value == "2"


def test_where_the_kernel_refuses_the_backend_is_unavailable_and_not_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlm_sandbox.backends.monty import backend as module
    from rlm_sandbox.backends.monty.launch import Launcher

    monkeypatch.setattr(module, "confined_launcher", lambda: Launcher(None, "no user namespaces", "allow them"))
    fresh = module.MontyBackend()
    assert fresh.probe() == Availability(False, "no user namespaces", "allow them")
    assert fresh.probe(MontyOptions(confinement="language")).usable


_LOOPING_HOST = """
import sys, threading, time
from rlm_sandbox import open_repl, Limits
repl = open_repl("monty", limits=Limits(time_seconds=60))
print(repl._interpreter.worker.pid, flush=True)
repl.exec("while True: pass")
"""


def test_a_worker_dies_with_its_host_even_in_a_loop_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", _LOOPING_HOST], stdout=subprocess.PIPE, text=True, env=environment) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        time.sleep(0.2)
        host.send_signal(signal.SIGKILL)
        host.wait()
        assert gone(pid)
    assert list(tmp_path.iterdir()) == []


def test_where_this_process_cannot_be_seen_in_proc_the_script_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rlm_sandbox.backends.monty import launch

    def refused(name: str, text: str) -> str:
        raise PermissionError(name)

    monkeypatch.setattr(launch, "_in_memory", refused)
    monkeypatch.setattr(launch, "_directory", lambda owner: tmp_path)
    found = launch._launcher.__wrapped__(os.getpid())
    assert found.path == str(tmp_path / "worker"), found.reason


# ---- many sessions, few workers


def test_more_sessions_than_workers() -> None:
    options = MontyOptions(max_processes=2, spare_workers=1)
    with contextlib.ExitStack() as stack:
        repls = [stack.enter_context(open_repl("monty", options=options)) for _ in range(12)]
        for number, repl in enumerate(repls):
            repl.bind("ask", lambda number=number: number)
            assert repl.exec(f"x = {number}\ndef f(): return x + ask()").outcome == "ok"
        for number, repl in enumerate(repls):
            result = repl.exec("f(), ask()")
            assert (result.value, result.state) == (f"({2 * number}, {number})", "kept")
        running = [repl for repl in repls if not repl._interpreter.parked]  # type: ignore[attr-defined]
        assert len(running) <= 2


def test_hundreds_of_sessions_live_on_four_workers() -> None:
    """Thousands are the benchmark's: `bench_monty.py --sessions 2000`. The language alone, whose workers start in no time."""
    options = MontyOptions(max_processes=4, confinement="language")
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(4) as threads:
            repls = list(threads.map(lambda _: open_repl("monty", options=options), range(300)))
            for repl in repls:
                stack.enter_context(repl)
            list(threads.map(lambda number: repls[number].set("x", [number]), range(300)))
        asleep = [repl for repl in repls if repl._interpreter.parked]  # type: ignore[attr-defined]
        assert len(asleep) >= 296
        for number in (0, 150, 299, 7):
            result = repls[number].exec("x.append(1)\nx")
            assert (result.value, result.state) == (f"[{number}, 1]", "kept")
        assert repls[7].get("x") == [7, 1]


def test_a_session_without_recovery_can_be_parked_too() -> None:
    options = MontyOptions(max_processes=1)
    with open_repl("monty", options=options, recovery=False) as first, open_repl("monty", options=options) as second:
        first.set("x", [1, 2])
        second.set("x", [3])
        assert first.get("x") == [1, 2]
        assert second.get("x") == [3]


def test_a_parked_session_can_be_closed_reset_and_used_from_other_threads() -> None:
    options = MontyOptions(max_processes=1)
    with open_repl("monty", options=options) as first, open_repl("monty", options=options) as second:
        first.set("x", 1)
        second.set("x", 2)
        first.reset()
        assert first.get("x") is None
        first.close()
        assert second.get("x") == 2
        answers: list[int | None] = []
        with contextlib.ExitStack() as stack:
            repls = [stack.enter_context(open_repl("monty", options=options)) for _ in range(4)]

            def work(repl: REPLProtocol, number: int) -> None:
                for step in range(5):
                    repl.set("y", number * 10 + step)
                    answers.append(repl.get("y") - number * 10 - step)

            threads = [threading.Thread(target=work, args=pair) for pair in zip(repls, range(4), strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert answers == [0] * 20


def test_a_session_opened_inside_a_host_call_does_not_wait_for_its_ancestors() -> None:
    options = MontyOptions(max_processes=1)

    def nested(depth: int) -> int:
        with open_repl("monty", options=options) as inner:
            inner.bind("deeper", nested)
            result = inner.exec(f"deeper({depth - 1})" if depth else "0")
            assert result.value is not None, result.error
            return int(result.value) + 1

    assert nested(3) == 4


def test_a_pool_whose_workers_all_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlm_sandbox.backends.monty import pool

    monkeypatch.setattr(pool, "OPEN_SECONDS", 0.1)
    options = MontyOptions(max_processes=1)
    started = threading.Event()
    with open_repl("monty", options=options, limits=Limits(time_seconds=60)) as busy:
        busy.bind("begun", started.set)
        thread = threading.Thread(target=busy.exec, args=("begun()\nwhile True: pass",))
        thread.start()
        started.wait(60)
        with pytest.raises(PoolTimeout, match="max_processes=2"):
            open_repl("monty", options=options)
        busy.interrupt()
        thread.join(60)
    with open_repl("monty", options=options) as repl:
        assert repl.exec("1").value == "1"


def test_a_spare_worker_that_died_is_not_given_out() -> None:
    options = MontyOptions(max_processes=3)
    with open_repl("monty", options=options) as repl:
        spares = repl._slot.pool._spares[True]  # type: ignore[attr-defined]
        deadline = time.monotonic() + 60
        while not spares and time.monotonic() < deadline:
            time.sleep(0.01)
        spare = spares[0]
        spare.kill()
        while spare.runs and time.monotonic() < deadline + 10:  # /proc shows a zombie before its last thread has ended
            time.sleep(0.01)
        with open_repl("monty", options=options) as other:
            assert other.exec("1").value == "1"


def test_what_was_sealed_elsewhere_is_not_loaded() -> None:
    import dataclasses

    from rlm_sandbox.backends.monty.sealed import BrokenSeal, seal, unseal

    sealed = seal(b"state")
    assert unseal(sealed) == b"state"
    with pytest.raises(BrokenSeal):
        unseal(dataclasses.replace(sealed, state=b"other"))


# ---- copies of a session


def test_a_fork_has_the_same_state_and_goes_its_own_way() -> None:
    options = MontyOptions(max_processes=1)
    context = Context.from_text("one two three")
    with open_repl("monty", options=options) as repl:
        repl.bind("ctx", context)
        repl.bind("ask", str.upper)
        repl.bind("P", context.whole)
        assert isinstance(repl, SupportsFork)
        repl.exec("x = [1]\nkeep = ctx\ndef f(): return ask('a'), len(x)")
        with repl.fork() as copy:
            assert copy.exec("x.append(2)\nf(), keep.slice(0, 3), len(ctx), ctx.find('t.o', regex=True)[0][2], P[4:7]").value == (
                "(('A', 2), 'one', 13, 'two', 'two')"
            )
            assert repl.exec("f(), ctx.find('t.o', regex=True)[0][2]").value == "(('A', 1), 'two')"
            assert copy.capabilities == repl.capabilities
            assert set(copy.names()) == {"x", "keep", "f"}
        assert repl.exec("x").value == "[1]"


def test_a_checkpoint_brings_back_variables_and_bindings() -> None:
    with open_repl("monty") as repl:
        assert isinstance(repl, SupportsCheckpoint)
        repl.bind("ask", str.upper)
        repl.exec("x = 1")
        first = repl.checkpoint()
        repl.bind("ask", str.lower)
        repl.exec("x = 2\ny = 3")
        second = repl.checkpoint()
        repl.restore(first)
        assert repl.exec("x, ask('aB')").value == "(1, 'AB')"
        assert repl.get("y") is None
        repl.restore(second)
        assert repl.exec("x, y, ask('aB')").value == "(2, 3, 'ab')"
        killed = repl.exec("x = 9\nwhile True: pass", limits=Limits(time_seconds=0.2))
        assert killed.state == "restored"
        assert repl.get("x") == 2
        with pytest.raises(ValueError, match="no such checkpoint"):
            repl.restore("0" * 16)


def test_a_checkpoint_that_was_changed_is_not_loaded() -> None:
    import dataclasses

    with open_repl("monty") as repl:
        repl.exec("x = 1")
        key = repl.checkpoint()  # type: ignore[attr-defined]
        moment = repl._checkpoints[key]  # type: ignore[attr-defined]
        point = moment.interpreter.point
        forged = dataclasses.replace(point, state=dataclasses.replace(point.state, state=point.state.state[:-1] + b"\0"))
        repl._checkpoints[key] = dataclasses.replace(  # type: ignore[attr-defined]
            moment, interpreter=dataclasses.replace(moment.interpreter, point=forged)
        )
        with pytest.raises(GuestCrashed):
            repl.restore(key)  # type: ignore[attr-defined]
        assert repl.exec("1").value == "1"


# ---- the host's other threads


def test_a_catastrophic_pattern_does_not_hold_up_other_threads() -> None:
    worst = 0.0
    done = threading.Event()

    def tick() -> None:
        nonlocal worst
        while not done.is_set():
            start = time.monotonic()
            time.sleep(0.005)
            worst = max(worst, time.monotonic() - start)

    with open_repl("monty", limits=Limits(time_seconds=4)) as repl, open_repl("monty") as other:
        repl.bind("ctx", Context.from_text("a" * 5_000 + "b"))
        thread = threading.Thread(target=tick)
        thread.start()
        running = threading.Thread(target=repl.exec, args=("ctx.find(r'(a|aa)+$', regex=True)",))
        running.start()
        answers = 0
        while running.is_alive():
            assert other.exec("1 + 1").value == "2"
            answers += 1
        done.set()
        thread.join()
    assert answers > 10
    assert worst < 3, "a match that held the interpreter's lock would take all of the four seconds"
