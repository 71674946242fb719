"""The wasm backend against its own ways to fail: deep stacks, aborting interpreters, replays, full heaps, odd texts."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlm_sandbox import Context, ExecResult, Limits, REPLProtocol, UnsupportedLimit, open_repl
from rlm_sandbox.backends.wasm.session import WasmSession
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable


@pytest.fixture(scope="module", autouse=True)
def wasm() -> None:
    require_usable("wasm", load_backend("wasm").probe())


@pytest.fixture
def repl() -> Iterator[REPLProtocol]:
    with open_repl("wasm", limits=Limits(time_seconds=20)) as opened:
        yield opened


KILL = "import os\nos._exit(1)"


# ---- the host survives


@pytest.mark.parametrize(
    "code",
    [
        "import json\njson.loads('[' * 200000)",
        "import json\njson.loads('{\"a\":' * 200000)",
        "eval('(' * 5000 + ')' * 5000)",
        "import ast\nast.parse('-' * 200000 + '1')",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    return f()\nf()",
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self):\n        return repr(self)\nrepr(A())",
        "t = []\nfor _ in range(100_000):\n    t = [t]\nrepr(t)",
        "t = ()\nfor _ in range(1_000_000):\n    t = (t,)\nhash(t)",
        "t = []\nfor _ in range(1_000_000):\n    t = [t]\ndel t",
        "import re\nre.compile('(' * 5000 + ')' * 5000)",
        "import pickle\npickle.dumps(__import__('functools').reduce(lambda a, _: [a], range(100_000), []))",
        "compile('x' + '.a' * 100_000, 'c', 'eval')",
    ],
    ids=[
        "list",
        "dict",
        "eval",
        "minus",
        "recursion",
        "repr",
        "deep list",
        "deep hash",
        "deep del",
        "regex",
        "pickle",
        "attributes",
    ],
)
def test_a_deep_stack_costs_at_most_the_cell(repl: REPLProtocol, code: str) -> None:
    assert repl.exec("kept = 1").ok
    result = repl.exec(code)
    assert result.outcome in ("ok", "error", "limit", "crashed")
    assert result.state in ("kept", "restored")
    assert repl.get("kept") == 1


@pytest.mark.parametrize(
    "code",
    ["import os\nos.abort()", "import faulthandler\nfaulthandler._sigsegv()", "import _socket\n_socket.socket()", KILL],
    ids=["abort", "segv", "raw socket", "exit"],
)
def test_what_ends_the_interpreter_costs_only_the_cell(repl: REPLProtocol, code: str) -> None:
    assert repl.exec("kept = [1]").ok
    result = repl.exec(f"print('before')\n{code}")
    assert result.outcome in ("crashed", "error")
    assert result.stdout.startswith("before")
    assert repl.get("kept") == [1]


@pytest.mark.parametrize(
    "code",
    [
        "import wit_world\nwit_world.suspend('x' * (140 << 20))",
        "import wit_world\nwit_world.suspend('')",
        "import wit_world\nwit_world.suspend('3\\n[1]')",
        "import wit_world\nwit_world.suspend('40\\n[\"done\",null,null,null,false,null]')",
        "import wit_world\nwit_world.text_piece(2**64 - 1)",
        "import wit_world\nwit_world.write_out(77, True, 'x' * 1000)",
    ],
    ids=["too much", "empty", "no message", "forged end", "text", "descriptor"],
)
def test_the_raw_imports_give_nothing(repl: REPLProtocol, code: str) -> None:
    assert repl.exec("kept = [1]").ok
    result = repl.exec(code, limits=Limits(time_seconds=5))
    assert result.outcome in ("ok", "error", "crashed", "violation", "limit")
    assert repl.get("kept") == [1]


def test_the_callers_small_stack_does_not_matter() -> None:
    outcomes: list[str] = []

    def use() -> None:
        with open_repl("wasm") as session:
            outcomes.append(session.exec("import json\njson.loads('[' * 200000)").outcome)

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=use)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert outcomes == ["error"]


@pytest.mark.parametrize("inline", [False, True])
def test_the_deadline_holds_after_a_long_host_call_on_any_thread(inline: bool) -> None:
    """Longer than all of the limit, twice, on a thread that is not the main one: what is left of the limit is still kept to."""
    results: list[ExecResult] = []

    def use() -> None:
        with open_repl("wasm", limits=Limits(time_seconds=0.4, wall_seconds=60)) as session:
            session.bind("ask", lambda: time.sleep(0.5), inline=inline)
            session.exec("kept = 1")
            results.append(session.exec("ask()\nask()\nwhile True:\n    pass"))
            results.append(session.exec("ask()\nask()\nimport time\ntime.sleep(40)"))
            results.append(session.exec("ask()\nkept"))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(60)
    assert [result.outcome for result in results] == ["limit", "limit", "ok"]
    assert all(result.limit is not None and result.limit.kind == "time_seconds" for result in results[:2])
    assert results[2].value == "1"


_INTERRUPTED = """
import random, signal
from rlm_sandbox import Limits, open_repl

armed = False

def interrupt(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
random.seed(5)
interrupts = 0
with open_repl("wasm", limits=Limits(time_seconds=20)) as session:
    session.bind("f", lambda n: n)
    session.exec("log = []")
    log = []
    for n in range(90):
        cell = ["log.append({n})", "f({n})\\nlog.append({n})", "log.append({n})\\nf({n})", "import os\\nos._exit(1)"][n % 4].format(n=n)
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 0.004))
            result = session.exec(cell)
            armed = False
            assert result.state != "lost", result
            done = result.outcome == "ok"
            unknown = False
        except KeyboardInterrupt:  # while the cell ran, or when it had ended
            interrupts += 1
            unknown = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        held = session.get("log")
        assert held == log or ((unknown or done) and held == [*log, n]), (cell, held, log)
        assert unknown or n % 4 == 3 or held == [*log, n], (cell, held, log)
        log = held
assert interrupts > 10, interrupts
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that signal")
def test_ctrl_c_at_any_moment_ends_neither_the_host_nor_the_truth() -> None:
    """What the engine does for the main thread is done on others: an exception of a signal handler's cannot pass through it."""
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


_FORKS = """
import os
from rlm_sandbox import SessionClosed, open_repl

with open_repl("wasm") as session:
    assert session.exec("1").ok  # the thread it ran on waits for its next job
    child = os.fork()
    if child == 0:
        with open_repl("wasm") as own:
            assert own.exec("2 + 2").value == "4"
        try:
            session.exec("1")
        except SessionClosed:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert session.exec("3").value == "3"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_that_was_forked_has_sessions_of_its_own() -> None:
    """The threads of its parent do not exist in it."""
    done = subprocess.run([sys.executable, "-c", _FORKS], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- recovery by replay


def test_a_replay_repeats_no_host_call_and_no_output(repl: REPLProtocol) -> None:
    calls: list[int] = []

    def f(n: int) -> int:
        calls.append(n)
        return n * 10 + len(calls)

    chunks: list[Any] = []
    repl.bind("f", f)
    assert repl.exec("a = f(1)\nb = [f(n) for n in (2, 3)]\nprint('said once')").ok
    assert repl.exec("try:\n    c = f(4)\n    1 / 0\nexcept ZeroDivisionError:\n    pass\nundefined_name").outcome == "error"
    before = {name: repl.get(name) for name in "abc"}
    result = repl.exec(KILL, on_output=chunks.append)
    assert (result.outcome, result.state, result.lost_names) == ("crashed", "restored", ())
    assert (result.stdout, chunks) == ("", [])
    assert {name: repl.get(name) for name in "abc"} == before
    assert calls == [1, 2, 3, 4]
    assert repl.exec("f(5)").value == "55"


def test_times_random_numbers_and_addresses_are_the_same_after_a_replay(repl: REPLProtocol) -> None:
    code = (
        "import os, random, secrets, time, uuid\n"
        "seen = [random.random(), time.time(), time.monotonic(), time.perf_counter(), str(uuid.uuid4()), secrets.token_hex(), os.urandom(4)]\n"
        "class K:\n    pass\nobjects = {K() for _ in range(50)}\nseen.append([id(item) for item in objects])"
    )
    assert repl.exec(code).ok
    seen = repl.get("seen")
    assert repl.exec(KILL).state == "restored"
    assert repl.get("seen") == seen
    assert repl.exec("[id(item) for item in objects] == seen[-1]").value == "True"


def test_random_numbers_differ_between_sessions() -> None:
    code = "import random, uuid\nseen = [random.random(), uuid.uuid4().hex]"
    seen = []
    for _ in range(3):
        with open_repl("wasm") as session:
            assert session.exec(code).ok
            seen.append(tuple(session.get("seen")))
    assert len(set(seen)) == 3


def test_what_no_data_snapshot_could_hold_comes_back(repl: REPLProtocol) -> None:
    code = (
        "def gen():\n    n = 0\n    while True:\n        n += 1\n        yield n\n"
        "g = gen()\nnext(g)\nshared = []\na = {'x': shared}\nb = [shared]\n"
        "import random\nrandom.seed(7)\nfirst = random.random()\nimport io\nfile = io.StringIO('one\\ntwo\\n')\nfile.readline()\n"
        "add = lambda n: shared.append(n) or len(shared)"
    )
    assert repl.exec(code).ok
    assert repl.exec(KILL).state == "restored"
    check = "add(1)\n[next(g), a['x'] is b[0], b, file.readline(), random.random()]"
    value = repl.exec(check).value
    rng = random.Random(7)
    rng.random()
    assert value == repr([2, True, [[1]], "two\n", rng.random()])


def test_a_slept_hour_is_not_slept_again(repl: REPLProtocol) -> None:
    """It sleeps for longer than a recovery may take: slept again, it would be lost."""
    assert repl.exec("import time\nstarted = time.monotonic()\ntime.sleep(2.5)\nslept = time.monotonic() - started").ok
    slept = repl.get("slept")
    assert repl.exec(KILL).state == "restored"
    assert repl.get("slept") == slept


def test_a_journal_too_long_to_run_again_in_time_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all its cells computed would not fit into a recovery; what the follower has left to run does."""
    heavy = "n = 0\nfor i in range(1_000_000):\n    n += i % 7"
    with open_repl("wasm", limits=Limits(time_seconds=60)) as session:
        assert isinstance(session, WasmSession)
        replay = session._replay
        for _ in range(10):
            assert session.exec(heavy).ok
        for _ in range(2):  # after a recovery the next follower has it all to do again
            wait_for(lambda: session.exec("0").protected and replay.journal.seconds_since(replay._followed()) < 0.05)
            monkeypatch.setattr("rlm_sandbox.backends.wasm.replay.RECOVERY_SECONDS", replay.journal.seconds_since(0) / 2)
            result = session.exec(KILL)
            monkeypatch.undo()
            assert result.state == "restored"
            assert session.get("n") == sum(i % 7 for i in range(1_000_000))


def test_the_hundredth_cell_has_no_more_to_run_again_than_the_tenth() -> None:
    with open_repl("wasm") as session:
        assert isinstance(session, WasmSession)
        replay = session._replay
        unfollowed = []
        for n in range(1, 101):
            assert session.exec(f"v{n} = [{n}]\ndef f{n}():\n    return v{n}").ok
            if n in (10, 100):
                wait_for(lambda: len(replay.journal) == replay._followed())
                unfollowed.append(len(replay.journal) - replay._followed())
        assert unfollowed == [0, 0]
        assert session.exec(KILL).state == "restored"
        assert session.exec("[f1(), f50(), f100()]").value == "[[1], [50], [100]]"


def wait_for(condition: Any, seconds: float = 40.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_what_cannot_be_rebuilt_in_time_is_lost_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm_sandbox.backends.wasm.replay.RECOVERY_SECONDS", 0.1)
    with open_repl("wasm", limits=Limits(time_seconds=60), setup="base = 5") as session:
        session.bind("f", lambda: "host")
        assert session.exec("n = 0\nfor i in range(8_000_000):\n    n += i % 7").ok
        result = session.exec(KILL)
        assert (result.outcome, result.state, result.protected) == ("crashed", "lost", False)
        assert {"n", "i"} <= set(result.lost_names)
        assert session.exec("[base, f()]").value == "[5, 'host']"


def test_a_journal_that_grows_too_large_is_given_up_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm_sandbox.backends.wasm.journal.MAX_BYTES", 100_000)
    with open_repl("wasm") as session:
        session.bind("f", lambda: "x" * 200_000)
        assert session.exec("a = 1").protected
        assert session.exec("b = len(f())").ok
        assert not session.exec("c = 2").protected
        result = session.exec(KILL)
        assert (result.state, result.lost_names) == ("lost", ("a", "b", "c"))
        assert session.exec("d = 1").protected


def test_reading_the_clock_for_ever_does_not_fill_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm_sandbox.backends.wasm.journal.MAX_BYTES", 100_000)
    with open_repl("wasm", limits=Limits(time_seconds=20)) as session:
        assert session.exec("import time\nfor _ in range(10_000):\n    time.time()").ok
        assert not session.exec("x = 1").protected


def test_a_heap_left_full_is_given_up() -> None:
    with open_repl("wasm", limits=Limits(memory_mb=96, time_seconds=20)) as session:
        assert session.exec("kept = 'yes'").ok
        result = session.exec("hoard = []\nwhile True:\n    hoard.append('x' * 500 + str(len(hoard)))")
        assert (result.outcome, result.state) == ("limit", "restored")
        assert result.limit is not None
        assert result.limit.kind == "memory_mb"
        assert session.exec("more = list(range(100_000))\nlen(more)").value == "100000"
        assert session.get("kept") == "yes"


# ---- contexts


@pytest.mark.parametrize(
    "text", ["", "a", "é" * 10, "日本" * 10, "\U0001f600x" * 10, "a\x00b", "a\ud800b\udc00\udfff", "x" * 3_000_000]
)
def test_the_whole_text_comes_on_first_use(repl: REPLProtocol, text: str) -> None:
    repl.bind("P", Context.from_text(text).whole)
    assert repl.names() == {}
    assert repl.exec("n = len(P)").ok
    assert repl.get("n") == len(text)
    assert repl.get("P") == text
    assert repl.exec(KILL).state == "restored"
    assert repl.get("P") == text


def test_one_large_write_goes_out_in_pieces() -> None:
    """Whatever is written at once, little of it is on its way; characters are not cut."""
    pieces: list[str] = []
    with open_repl("wasm", limits=Limits(output_bytes=None)) as repl:
        result = repl.exec("print('a€' * 400_000, end='')", on_output=lambda chunk: pieces.append(chunk.text))
    assert result.stdout == "".join(pieces) == "a€" * 400_000
    assert max(len(piece.encode()) for piece in pieces) <= 256 * 1024


def test_a_write_larger_than_the_engine_carries_is_cut_like_any_other() -> None:
    with open_repl("wasm", limits=Limits(output_bytes=10_000)) as repl:
        result = repl.exec("import sys\nkept = sys.stdout.write('x' * 150_000_000)")
        assert (result.outcome, result.state, result.dropped_bytes) == ("ok", "kept", 150_000_000 - 10_000)
        assert repl.get("kept") == 150_000_000


def test_a_text_too_large_for_the_guest_is_the_cells_limit() -> None:
    with open_repl("wasm", limits=Limits(memory_mb=64)) as session:
        context = Context.from_text("x" * 80_000_000)
        session.bind("P", context.whole)
        session.bind("ctx", context)
        result = session.exec("len(P)")
        assert result.outcome == "limit"
        assert result.limit is not None
        assert (result.limit.kind, result.limit.limit) == ("memory_mb", 64)
        assert session.exec("ctx.len_chars()").value == "80000000"


def test_a_context_that_a_host_function_returns_is_searched_apart(repl: REPLProtocol) -> None:
    repl.bind("find_text", lambda: Context.from_text("one needle here"))
    assert repl.exec("find_text().find('n..dle', regex=True)").value == "[(4, 10, 'needle')]"


# ---- one thread


def test_asyncio_works_without_threads_and_sockets(repl: REPLProtocol) -> None:
    async def ask(n: int) -> int:
        return n * 2

    repl.bind("ask", ask)
    code = (
        "import asyncio\n"
        "async def main():\n    await asyncio.sleep(0.01)\n    return await asyncio.gather(*[ask(n) for n in range(5)])\n"
        "two = await main()\nthree = await asyncio.to_thread(lambda: 3)\n"
        "async with asyncio.timeout(5):\n    four = await ask(2)\n"
        "async with asyncio.TaskGroup() as group:\n    five = group.create_task(ask(5))\nfive = five.result()"
    )
    assert repl.exec(code).ok
    assert repl.exec("one = asyncio.run(main())").ok
    assert [repl.get(name) for name in ("one", "two", "three", "four", "five")] == [[0, 2, 4, 6, 8], [0, 2, 4, 6, 8], 3, 4, 10]


def test_a_timeout_of_the_guest_ends_its_wait_for_the_host(repl: REPLProtocol) -> None:
    async def long() -> None:
        await asyncio.sleep(30)

    repl.bind("long", long)
    result = repl.exec("import asyncio\nawait asyncio.wait_for(long(), 0.3)")
    assert result.error is not None
    assert result.error.startswith("TimeoutError")


def test_waiting_for_nothing_is_an_error(repl: REPLProtocol) -> None:
    result = repl.exec("import asyncio\nawait asyncio.Future()")
    assert result.error is not None
    assert "wait for ever" in result.error


def test_wall_time_over_in_a_host_call_keeps_the_state() -> None:
    release = threading.Event()
    with open_repl("wasm", limits=Limits(wall_seconds=0.5)) as session:
        session.bind("slow", release.wait)
        result = session.exec("before = 1\nslow()")
        release.set()
        assert (result.outcome, result.state) == ("limit", "kept")
        assert session.get("before") == 1


def test_sessions_in_threads_run_in_parallel_with_the_host() -> None:
    """The interpreter lock is free while a guest computes: the host's thread goes on counting."""
    counted = 0
    with open_repl("wasm") as session:
        thread = threading.Thread(target=lambda: session.exec("n = 0\nfor i in range(10_000_000):\n    n += 1"))
        thread.start()
        while thread.is_alive():
            counted += 1
    assert counted > 10_000


def test_what_a_guest_lacks_raises_where_it_is_used(repl: REPLProtocol) -> None:
    for code, error in {
        "import socket\nsocket.socket()": "PermissionError: this sandbox has no network",
        "import urllib.request\nurllib.request.urlopen('http://localhost')": "URLError",
        "open('/etc/passwd')": "FileNotFoundError",
        "open('/tmp/x', 'w')": "FileNotFoundError",
        "import subprocess\nsubprocess.run(['ls'])": "OSError",
        "import threading\nthreading.Thread(target=print).start()": "RuntimeError: can't start new thread",
        "import ctypes": "ModuleNotFoundError",
        "input()": "EOFError",
        "import numpy": "ModuleNotFoundError",
    }.items():
        result = repl.exec(code)
        assert result.outcome == "error", code
        assert error in (result.error or ""), code
    assert repl.exec("import sys\nsys.stdin.read()").value == "''"
    assert repl.exec("sys.__stdout__.write('out\\n')\nimport os\nwritten = os.write(2, b'err\\n')").stdout == "out\n"
    assert repl.exec("import os\ndict(os.environ)").value == "{}"


def test_the_documented_modules_are_missing_and_the_listed_ones_are_there(repl: REPLProtocol) -> None:
    from rlm_sandbox.runners.wasm_modules import MODULES

    code = (
        "import importlib\nmissing = []\nfor name in names:\n    try:\n        importlib.import_module(name)\n"
        "    except ImportError:\n        missing.append(name)"
    )
    repl.set("names", list(MODULES))
    assert repl.exec(code).ok
    assert repl.get("missing") == []
    absent = ["bz2", "lzma", "compression.zstd", "ctypes", "ssl", "mmap", "fcntl", "readline", "curses", "resource", "tkinter"]
    repl.set("names", absent)
    assert repl.exec(code).ok
    assert repl.get("missing") == absent
    assert repl.exec("import zoneinfo\nzoneinfo.available_timezones()").value == "set()"
    assert repl.exec("import datetime\ndatetime.datetime.strptime('2024', '%Y').year").value == "2024"


def test_the_machine_is_32_bits_wide_and_its_hashes_are_baked_in(repl: REPLProtocol) -> None:
    assert repl.exec("import sys\n[sys.maxsize, sys.platform]").value == "[2147483647, 'wasi']"
    assert repl.exec("2 ** 100").value == str(2**100)
    assert repl.exec("'a' * 10 ** 10").error == "OverflowError: cannot fit 'int' into an index-sized integer"
    hashes = set()
    for _ in range(2):
        with open_repl("wasm") as session:
            hashes.add(session.exec("hash('abc')").value)
    assert len(hashes) == 1


def test_a_memory_limit_below_the_interpreters_own_is_refused() -> None:
    with pytest.raises(UnsupportedLimit, match="memory_mb=48 or more"):
        open_repl("wasm", limits=Limits(memory_mb=16))
    with open_repl("wasm", limits=Limits(memory_mb=48)) as session:
        assert session.exec("len([0] * 100_000)").ok
