"""Many sessions in one process: nothing of one shows in another, nothing is left behind, and a host that dies takes all along.

About 45 s alone on two cores, 100 s on the same machine with a load of seven; half of it the 1,000 sessions.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from rlm_sandbox import Context, Limits, OutputChunk, REPLProtocol, SessionClosed, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from ..spares import living

#: How long what was killed may take to be gone; a loaded machine's share included.
GONE_SECONDS: Final = 2.0


@pytest.fixture(scope="module", autouse=True)
def usable() -> None:
    require_usable("jail", load_backend("jail").probe())


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """A session holds nine descriptors; 200 of them are more than many a default limit, and more than select() takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4_096 if hard == resource.RLIM_INFINITY else min(4_096, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def small(**more: Any) -> REPLProtocol:
    return open_repl("jail", limits=Limits(memory_mb=64, disk_mb=4, **more))


def of_its_own(repl: REPLProtocol, number: int, rounds: int) -> None:
    """Use a session in every way and see only what is its own."""
    repl.bind("host", lambda value: [number, value])
    repl.bind("ctx", Context.from_text(f"text {number} of a context"))
    repl.set("mine", {"number": number})
    first = repl.exec("import os; os.mkdir('/tmp/d'); open('/tmp/d/f', 'w').write(str(mine['number'])); os.chdir('/tmp/d')")
    assert first.ok, first.error
    for turn in range(rounds):
        chunks: list[OutputChunk] = []
        cell = f"""
            import sys
            print('out', mine['number'], {turn})
            print('err', mine['number'], file=sys.stderr)
            v{turn} = [mine['number'], {turn}]
            names = sorted(name for name in globals() if name[0] == 'v')
            (host({turn}), open('f').read(), os.getcwd(), os.listdir('/tmp'), ctx[:12].split()[1], names)
        """
        result = repl.exec(textwrap.dedent(cell), read=(f"v{turn}",), on_output=chunks.append)
        names = [f"v{n}" for n in range(turn + 1)]
        assert result.value == repr(([number, turn], str(number), "/tmp/d", ["d"], str(number), names)), result
        assert result.stdout == f"out {number} {turn}\n"
        assert result.stderr == f"err {number}\n"
        assert sorted("".join(chunk.text for chunk in chunks)) == sorted(result.stdout + result.stderr)
        assert result.read == {f"v{turn}": [number, turn]}
    killed = repl.exec("mine = 'spoilt'\nos._exit(0)")
    assert (killed.outcome, killed.state) == ("crashed", "restored")
    assert repl.get("mine") == {"number": number}


def test_sixteen_sessions_in_sixteen_threads_are_apart() -> None:
    barrier = threading.Barrier(16)

    def one(number: int) -> None:
        barrier.wait(30)
        with small() as repl:
            of_its_own(repl, number, 10)

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(one, number) for number in range(16)]:
            done.result(60)


def test_two_hundred_sessions_in_one_process_are_apart() -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(small()) for _ in range(200)]
        for number, repl in enumerate(sessions):
            repl.bind("host", lambda number=number: number)
            assert repl.exec(f"mine = {number}; open('/tmp/f', 'w').write('{number}'); print({number})").stdout == f"{number}\n"
        order = list(enumerate(sessions))
        random.Random(1).shuffle(order)
        for number, repl in order:
            result = repl.exec("(mine, host(), open('/tmp/f').read())")
            assert result.value == repr((number, number, str(number)))
            assert set(repl.names()) == {"mine"}
        # One of them dies; the others do not notice.
        assert sessions[100].exec("mine = None\nos = __import__('os')\nos.abort()").state == "restored"
        sessions[101].close()
        for number in (99, 100, 102):
            assert sessions[number].exec("mine").value == str(number)


class Holdings:
    """What this process holds, counted."""

    def __init__(self) -> None:
        gc.collect()
        self.descriptors = len(list(Path("/proc/self/fd").iterdir()))
        self.threads = threading.active_count()
        self.children = {process.pid for process in living(psutil.Process())}
        self.memory_files = Path("/proc/self/maps").read_text().count("memfd:")
        self.files = sorted(path.name for path in Path(tempfile.gettempdir()).iterdir())

    def counts(self) -> tuple[int, int, int, int]:
        return self.descriptors, self.threads, len(self.children), self.memory_files


def settled(before: Holdings) -> Holdings:
    """The holdings once they have come down to those of before, or as they are after 60 s."""
    until = time.monotonic() + 60
    while True:
        now = Holdings()
        if all(have <= had for have, had in zip(now.counts(), before.counts(), strict=True)) or time.monotonic() > until:
            return now
        time.sleep(0.1)


def test_a_thousand_sessions_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other programs of this machine use the usual one, too

    def one(number: int) -> None:
        repl = small(session_seconds=60)
        try:
            if number % 5 == 0:
                repl.bind("host", lambda: number)
                assert repl.exec("host()").value == str(number)
            if number % 7 == 0:
                repl.bind("ctx", Context.from_text("text " * 100))
                assert repl.exec("len(ctx)").value == "500"
            if number % 50 == 0:
                assert repl.exec("import os; os._exit(1)").outcome == "crashed"
            if number % 100 == 1:
                repl.reset()
        finally:
            repl.close()

    one(0)
    one(1)
    settled_before = settled(Holdings())
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(one, number) for number in range(1_000)]:
            done.result(60)
    now = settled(settled_before)
    assert now.descriptors <= settled_before.descriptors
    assert now.threads <= settled_before.threads
    assert now.children <= settled_before.children, "a process is left"
    assert now.memory_files <= settled_before.memory_files
    assert now.files == settled_before.files


def test_sessions_that_are_dropped_without_close_leave_nothing() -> None:
    with small() as warm:
        warm.exec("1")
    before = settled(Holdings())
    for _ in range(5):
        repl = small()
        repl.bind("f", lambda: 1)
        assert repl.exec("f()").ok
        with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031 - the deletion is what warns
            del repl
            gc.collect()
    now = settled(before)
    assert now.children <= before.children
    assert now.descriptors <= before.descriptors


def test_the_threads_that_opened_sessions_may_end() -> None:
    opened: list[REPLProtocol] = []
    threads = [threading.Thread(target=lambda: opened.append(small())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.2)
    try:
        for number, repl in enumerate(opened):
            of_its_own(repl, number, 2)
    finally:
        for repl in opened:
            repl.close()


def test_close_and_a_call_at_the_same_moment_leave_nothing() -> None:
    """Whoever comes last frees the guest, also when `close` comes between the end of a call and the end of its lock."""
    with small() as warm:
        warm.exec("1")
    before = settled(Holdings())
    for number in range(60):
        repl = small()
        thread = threading.Timer(random.Random(number).uniform(0, 0.004), repl.close)
        thread.start()
        with contextlib.suppress(SessionClosed):
            while True:
                repl.exec("x = 1")
        thread.join()
    now = settled(before)
    assert now.children <= before.children
    assert now.descriptors <= before.descriptors


def test_a_process_without_descriptors_says_so_and_loses_none() -> None:
    code = """
        import os, resource
        from rlm_sandbox import BackendUnavailable, open_repl
        warm = open_repl("jail")
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        opened, failed = [], 0
        for _ in range(4):
            try:
                opened.append(open_repl("jail"))
            except BackendUnavailable as exc:
                failed += 1
        assert opened and failed, (len(opened), failed)
        for repl in opened: assert repl.exec("1 + 1").value == "2"
        held = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            try: open_repl("jail"); raise SystemExit("it opened")
            except BackendUnavailable: pass
        assert len(os.listdir("/proc/self/fd")) == held
        for repl in opened: repl.close()
        with open_repl("jail") as repl: assert repl.exec("1 + 1").value == "2"
        print("fine")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "fine\n", ended.stderr


# ---- the host is killed

_HOST: Final = textwrap.dedent("""
    import sys, threading, time
    from rlm_sandbox import Context, Limits, open_repl
    def opening():
        while True: open_repl("jail").close()
    def executing():
        repl = open_repl("jail")
        while True: repl.exec("x = 1\\nfor _ in range(1000): x += 1")
    def looping():
        open_repl("jail", limits=Limits(time_seconds=60)).exec("while True: pass")
    def threads():
        open_repl("jail").exec("import threading\\nfor _ in range(5): threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()")
    def recovering():
        repl = open_repl("jail")
        while True: repl.exec("import os; os._exit(1)")
    def calling():
        repl = open_repl("jail")
        repl.bind("f", lambda: time.sleep(0.001))
        while True: repl.exec("for _ in range(50): f()")
    def blocked():
        repl = open_repl("jail")
        repl.bind("f", threading.Event().wait)
        repl.exec("f()")
    def printing():
        open_repl("jail", limits=Limits(time_seconds=60)).exec("while True: print('x' * 1000)")
    def closing():
        while True:
            sessions = [open_repl("jail") for _ in range(5)]
            for repl in sessions: repl.exec("x = [0] * 1_000_000")
            for repl in sessions: repl.close()
    def binding():
        repl = open_repl("jail")
        while True: repl.bind("ctx", Context.from_text("text " * 10_000))
    what = globals()[sys.argv[1]]
    if sys.argv[2] == "warm":
        open_repl("jail").exec("1")
    print("go", flush=True)
    for _ in range(2):
        threading.Thread(target=what, daemon=True).start()
    what()
""")  # fmt: skip

_MOMENTS: Final = (
    "opening",
    "executing",
    "looping",
    "recovering",
    "calling",
    "blocked",
    "printing",
    "closing",
    "binding",
    "threads",
)


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("moment", _MOMENTS)
def test_a_host_that_is_killed_leaves_no_process(moment: str, start: str) -> None:
    """Twenty rounds in all, each at another moment: also while the first session's launcher is not up yet."""
    chance = random.Random(f"{moment} {start} {time.time_ns()}")
    host = subprocess.Popen([sys.executable, "-c", _HOST, moment, start], stdout=subprocess.PIPE)
    try:
        assert host.stdout is not None
        assert host.stdout.readline() == b"go\n"
        time.sleep(chance.uniform(0, 0.35) if start == "cold" else chance.uniform(0, 0.1))
        seen: dict[int, psutil.Process] = {}
        for _ in range(3):
            seen.update((process.pid, process) for process in descendants(host.pid))
        os.kill(host.pid, signal.SIGKILL)
        # What it started between the last look and its death is found by its parent, or by its session leader.
        seen.update((process.pid, process) for process in descendants(host.pid))
    finally:
        host.kill()
        host.wait()
        assert host.stdout is not None
        host.stdout.close()
    _, alive = psutil.wait_procs(seen.values(), GONE_SECONDS)
    left = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert left == [], f"{moment}: {[(process.pid, process.cmdline()) for process in left]}"
    wait_until(lambda: not launchers(), GONE_SECONDS)
    assert launchers() == [], "a launcher or zygote without a host"


def launchers() -> list[psutil.Process]:
    """Launchers and zygotes of hosts that are gone: their parent is init, whoever that is here."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()
            if "launcher" in command and any(part.startswith("/proc/self/fd/") for part in command):
                parent = process.parent()
                if parent is None or not any("python" in part or "pytest" in part for part in parent.cmdline()[:2]):
                    found.append(process)
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
