"""The monty backend under attack, and what only this backend does. The contract itself is tests/conformance."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlm_sandbox import (
    Context,
    ExecResult,
    GuestCrashed,
    GuestError,
    LimitExceeded,
    Limits,
    Opaque,
    REPLProtocol,
    SupportsFork,
    UnsendableValue,
    expose,
    open_repl,
)
from rlm_sandbox.options import MontyOptions

from ..conftest import require_usable, variant_state


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    require_usable("monty", variant_state("monty"))


@pytest.fixture
def open_monty() -> Iterator[Callable[..., REPLProtocol]]:
    opened: list[REPLProtocol] = []

    def open_one(**limits: object) -> REPLProtocol:
        repl = open_repl("monty", limits=Limits(**limits))  # type: ignore[arg-type]
        opened.append(repl)
        return repl

    yield open_one
    for repl in opened:
        repl.close()


@pytest.fixture
def repl(open_monty: Callable[..., REPLProtocol]) -> REPLProtocol:
    return open_monty()


def worker_pid(repl: REPLProtocol) -> int:
    pid = repl._interpreter.worker.pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


# ---- attacks: (outcomes, limit kinds) of each

_ATTACKS: dict[str, tuple[str, str, str | None]] = {
    "loop": ("while True: pass", "limit", "time_seconds"),
    "swallow": ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", "limit", "time_seconds"),
    "finally": ("try:\n  while True: pass\nfinally:\n  while True: pass", "limit", "time_seconds"),
    "sleep": ("import time\ntime.sleep(3600)", "limit", "time_seconds"),
    "many sleeps": ("import time\nwhile True:\n  time.sleep(0.01)", "limit", "time_seconds"),
    "async sleep": ("import asyncio\nawait asyncio.sleep(3600)", "limit", "time_seconds"),
    "regex": ("import re\nre.match(r'(a+)+(?=b)\\1$', 'a' * 40)", "error", None),
    "regex on the context": ("ctx.find(r'(a|aa)+$', regex=True)", "limit", "time_seconds"),
    "page marker": ("ctx.page(1, marker_pattern='(a|aa)+$')", "limit", "time_seconds"),
    "context in crumbs": ("ctx.chunk(2, overlap=1)", "error", None),
    "every match": ("ctx.find('a', max_matches=10**9)", "error", None),
    "power": ("3 ** (10**8)", "limit", "time_seconds"),
    "one string": ("'a' * 10**10", "limit", "memory_mb"),
    "growing list": ("big = []\nwhile True: big.append('x' * 1000)", "limit", "memory_mb"),
    "squares": ("x = 2\nfor i in range(60): x = x * x", "limit", "memory_mb"),
    "recursion": ("def f(): return f()\nf()", "error", None),
    "flood": ("while True: print('x' * 1_000_000)", "limit", "time_seconds"),
    "argument": ("ask([0.5] * 10_000_000)", "limit", "memory_mb"),
    "brackets": ("(" * 3000 + ")" * 3000, "error", None),
    "shadow": ("open('/etc/shadow').read()", "error", None),
    "environment": ("import os\nos.environ", "error", None),
    "socket": ("import socket", "error", None),
}


@pytest.mark.parametrize("attack", _ATTACKS.values(), ids=_ATTACKS)
def test_an_attack_costs_only_its_cell(open_monty: Callable[..., REPLProtocol], attack: tuple[str, str, str | None]) -> None:
    code, outcome, kind = attack
    # Filling the memory may take its time on a loaded machine.
    repl = open_monty(time_seconds=10 if kind == "memory_mb" else 0.3, memory_mb=64)
    repl.bind("ctx", Context.from_text("a" * 1_000_000 + "b"))
    repl.bind("ask", len)
    assert repl.exec("keep = [1, 2]\ndef double(x):\n    return 2 * x").outcome == "ok"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = repl.exec(code)
    assert (result.outcome, result.limit and result.limit.kind) == (outcome, kind), result.error
    assert result.state == ("restored" if outcome == "limit" else "kept")
    assert len(result.stdout) <= 70_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000, "the host does not grow (KiB)"
    after = repl.exec("double(keep[1]), len(ctx), ask('abc')")
    assert (after.value, after.state) == ("(4, 1000001, 3)", "kept")


# ---- kernel limits


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="kernel limits are put on a worker on Linux only")
def test_the_worker_has_kernel_limits(open_monty: Callable[..., REPLProtocol]) -> None:
    repl = open_monty(memory_mb=64)
    pid = worker_pid(repl)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
    assert 64 << 20 < soft < 200 << 20
    assert soft <= hard < 400 << 20
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
    assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[1] <= 64
    assert resource.prlimit(pid, resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""


def test_a_worker_serves_one_session(open_monty: Callable[..., REPLProtocol]) -> None:
    first = open_monty()
    pid = worker_pid(first)
    first.close()
    assert worker_pid(open_monty()) != pid


# ---- recovery


def test_a_killed_worker_is_a_crash_and_is_restored(repl: REPLProtocol) -> None:
    repl.bind("die", lambda: os.kill(worker_pid(repl), signal.SIGKILL))
    repl.bind("store", expose({"a": 1}, methods=("get",)))
    repl.exec("x = 1\nalias = [store]")
    result = repl.exec("x = 2\ndie()\nwhile True: pass")
    assert (result.outcome, result.state) == ("crashed", "restored")
    assert repl.exec("x, store.get('a'), alias[0].get('a')").value == "(1, 1, 1)"


def test_a_worker_killed_between_cells_costs_the_state_and_says_so(repl: REPLProtocol) -> None:
    repl.bind("ask", str.upper)
    repl.exec("x = 1")
    repl.get("x")
    os.kill(worker_pid(repl), signal.SIGKILL)
    time.sleep(0.05)
    result = repl.exec("ask('a')")
    assert result.outcome == "crashed" or (result.state, result.lost_names, result.value) == ("lost", ("x",), "'A'")
    assert repl.exec("ask('b')").value == "'B'"


def test_a_heap_too_large_to_dump_is_unprotected_and_alive(open_monty: Callable[..., REPLProtocol]) -> None:
    repl = open_monty(memory_mb=512, time_seconds=5)
    assert repl.exec("big = ['%09d' % i + 'x' * 999_990 for i in range(300)]").outcome == "ok"
    result = repl.exec("len(big)")
    assert (result.value, result.protected) == ("300", False)
    assert isinstance(repl, SupportsFork)
    with pytest.raises(LimitExceeded):
        repl.fork()
    assert "<cell 3>" in (repl.exec("1 / 0").traceback or ""), "finding out that it is too large is no cell"
    repl.exec("big = None")
    assert repl.exec("1").protected, "the memory is free again"


def test_a_kill_of_an_unprotected_session_costs_its_names_and_says_so(open_monty: Callable[..., REPLProtocol]) -> None:
    repl = open_monty(memory_mb=512, time_seconds=5)
    repl.exec("small = 1\nbig = ['%09d' % i + 'x' * 999_990 for i in range(300)]")
    result = repl.exec("while True: pass", limits=Limits(time_seconds=0.1))
    assert (result.protected, result.state, result.lost_names) == (False, "lost", ("big", "small"))
    assert repl.exec("1").value == "1"


def test_what_counts_is_the_size_of_the_dump_and_not_of_the_heap(open_monty: Callable[..., REPLProtocol]) -> None:
    repl = open_monty(memory_mb=512, time_seconds=10)
    assert repl.exec("numbers = [str(i) for i in range(2_500_000)]").outcome == "ok"  # 350 MB, a dump of 70
    result = repl.exec("while True: pass", limits=Limits(time_seconds=0.1))
    assert (result.protected, result.state) == (True, "restored")
    assert repl.exec("numbers[-1]").value == "'2499999'"


_HOSTILE_VALUES = """
import asyncio, resource, sys
from pathlib import Path
from rlm_sandbox import Limits, open_repl

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

async def slow(*values):
    await asyncio.sleep(0.2)

with open_repl("monty", limits=Limits(memory_mb=128, time_seconds=10)) as repl:
    repl.bind("f", lambda *values: None)
    repl.bind("slow", slow)
    before = peak()
    for count in (900_000, 1_200_000):
        repl.exec(f"f([1.5] * {count})")
        repl.exec(f"x = [float(i) for i in range({count})]", read=("x",))
    repl.exec("f('x' * 60_000_000)")
    repl.exec("import asyncio\\nx = 'x' * 40_000_000\\nr = await asyncio.gather(*[slow(x + str(i)) for i in range(6)])")
    repl.exec("x = ['%09d' % i + 'x' * 999_990 for i in range(110)]")
    repl.exec("1")
    worker = resource.prlimit(repl._interpreter.worker.pid, resource.RLIMIT_DATA)[1] >> 20
    print(peak() - before, worker, repl.capabilities.host_memory_worst_mb)
"""


def test_what_a_hostile_session_takes_on_the_host_is_within_what_is_declared() -> None:
    done = subprocess.run([sys.executable, "-c", _HOSTILE_VALUES], capture_output=True, text=True, timeout=100, check=True)
    host, worker, declared = map(int, done.stdout.split())
    assert host > 50, "the values did reach the host"
    assert host + worker <= declared


def test_host_memory_without_a_limit_is_not_declared(open_monty: Callable[..., REPLProtocol]) -> None:
    assert open_monty(memory_mb=None).capabilities.host_memory_worst_mb is None


def test_a_host_object_returned_in_a_killed_cell_is_forgotten(open_monty: Callable[..., REPLProtocol]) -> None:
    repl = open_monty(time_seconds=0.2)
    repl.bind("make", lambda: expose([3, 1], methods=("count",)))
    repl.exec("old = make()")
    repl.exec("new = make()\nwhile True: pass")
    assert repl.exec("old.count(3)").value == "1"
    assert len(repl._bindings.door.table) == 2  # type: ignore[attr-defined]


# ---- host calls


def test_pending_calls_run_in_parallel_and_timers_with_them(repl: REPLProtocol) -> None:
    barrier = threading.Barrier(3)

    async def meet(n: int) -> int:
        import asyncio

        await asyncio.to_thread(barrier.wait, 10)
        return n

    repl.bind("meet", meet)
    code = "import asyncio\nasync def nap():\n    await asyncio.sleep(0.01)\n    return 'slept'\nawait asyncio.gather(meet(1), meet(2), meet(3), nap())"
    assert repl.exec(code).value == "[1, 2, 3, 'slept']"


def test_a_failed_call_can_be_caught_by_its_name(repl: REPLProtocol) -> None:
    def ask() -> None:
        raise RuntimeError("secret")

    repl.bind("ask", ask)
    assert repl.exec("try:\n    ask()\nexcept HostCallError as e:\n    r = str(e)\nr").value == "'ask failed'"
    assert repl.exec("ask()").error == "HostCallError: ask failed"


def test_a_method_can_be_taken_along(repl: REPLProtocol) -> None:
    repl.bind("ctx", Context.from_text("a needle"))
    assert repl.exec("look = ctx.find\nlook('needle')").value == "[(2, 8, 'needle')]"


def test_methods_beside_the_allow_list_do_not_exist(repl: REPLProtocol) -> None:
    repl.bind("ctx", Context.from_text("text"))
    for attempt in ("ctx.text", "ctx.memory_file()", "ctx.search", "ctx.rlm_len(1)", "ctx._context", "ctx.rlm_str()"):
        assert repl.exec(attempt).outcome == "error", attempt


def test_context_errors_keep_their_type(repl: REPLProtocol) -> None:
    repl.bind("ctx", Context.from_text("text"))
    assert (repl.exec("ctx.get_document(5)").error or "").startswith("IndexError: there is no document 5")
    assert (repl.exec("ctx.find('(', regex=True)").error or "").startswith("re.PatternError: ")
    assert (repl.exec("ctx.chunk(0)").error or "").startswith("ValueError: ")


# ---- values and names


def test_what_is_not_plain_is_opaque_and_never_text(repl: REPLProtocol) -> None:
    repl.bind("ask", str.upper)
    repl.exec("def f(): pass\nvalues = [f, len, ask, range(3), iter([1]), int, (1).__class__ if False else 1j]")
    found = repl.get("values")
    assert all(isinstance(item, Opaque) for item in found)
    assert found[0].type_name == "function"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = []\nx.append(x)\nask(x)", [Opaque("list", "[...]")]),
        ("x = {}\nx['k'] = x\nask(x)", {"k": Opaque("dict", "{...}")}),
        ("x = [1]\nx.append({'k': x})\nask(x)", [1, {"k": Opaque("list", "[...]")}]),
        ("x = ([],)\nx[0].append(x)\nask(x)", ([Opaque("tuple", "(...)")],)),
        ("x = [1]\nask([x, x, '{...}'])", [[1], [1], "{...}"]),
        ("ask('[...]')", "[...]"),
    ],
)
def test_what_contains_itself_reaches_the_host_as_opaque(repl: REPLProtocol, code: str, expected: object) -> None:
    asked: list[object] = []
    repl.bind("ask", asked.append)
    assert repl.exec(code).outcome == "ok"
    assert asked == [expected]


def test_what_contains_itself_can_be_read(repl: REPLProtocol) -> None:
    repl.exec("x = [1]\nx.append(x)\ny = {'x': x}\nz = [[[[1]]]]")
    assert repl.get("x") == [1, Opaque("list", "[1, [...]]")]
    assert repl.get("y") == {"x": [1, Opaque("list", "[1, [...]]")]}
    assert repl.get("z") == [[[[1]]]]


@pytest.mark.parametrize(
    "argument",
    [
        "range(3)", "slice(1, None)", "iter([1])", "iter('a')", "iter({1: 2})", "re.compile('a(b)')", "re.match('a', 'a')", "len", "int",
        "itertools.count()", "itertools.cycle('a')", "functools.partial(int, '3')", "re", "{1: '('}.keys()", "{1: [2]}.items()", "1j",
        "hashlib.md5()", "random.Random(1)", "decimal.getcontext()", "ValueError('x')", "sys.stdout", "csv.reader(['a'])", "decimal.Decimal(1)",
        "pathlib.Path('a')", "itertools.groupby('a')", "typing",
    ],
)  # fmt: skip
def test_what_is_no_plain_data_reaches_the_host_as_opaque(repl: REPLProtocol, argument: str) -> None:
    asked: list[object] = []
    repl.bind("ask", lambda *values: asked.extend(values))
    modules = "csv, decimal, functools, hashlib, itertools, pathlib, random, re, sys, typing"
    assert repl.exec(f"import {modules}\nask({argument}, [{argument}])").outcome == "ok"
    assert isinstance(asked[0], Opaque)
    assert isinstance(asked[1][0], Opaque)  # type: ignore[index]


@pytest.mark.parametrize(
    "text", ["range", "dict_keys are odd", "<b>", "re.compile", "slice(1)ing", "Field(s)", "<stdin>", "ranges(1, 2)", "functools"]
)
def test_ordinary_text_reaches_the_host_as_text(repl: REPLProtocol, text: str) -> None:
    asked: list[object] = []
    repl.bind("ask", asked.append)
    repl.set("given", text)
    repl.exec("ask(given)")
    assert asked == [text]


@pytest.mark.parametrize("argument", ["f", "[f]", "{f}", "{f: 1}", "(1, {'k': lambda: 1})"])
def test_a_function_is_no_text_wherever_it_is(repl: REPLProtocol, argument: str) -> None:
    asked: list[object] = []
    repl.bind("ask", asked.append)
    assert repl.exec(f"def f(): pass\nask({argument})").outcome == "error"
    assert asked == []


@pytest.mark.parametrize("value", ["\ud800", {"k": ["\udfff"]}])
def test_what_the_engine_would_change_is_refused(repl: REPLProtocol, value: object) -> None:
    with pytest.raises(UnsendableValue):
        repl.set("x", value)


def test_session_names_sees_variables_from_inside_functions(repl: REPLProtocol) -> None:
    repl.set("given", [1, 2])
    result = repl.exec("mine = 'x' * 100\ndef show():\n    return session_names()\nshow()")
    assert result.value is not None
    assert "'given': 'list, 2 items'" in result.value
    assert "str, 100 characters: " in result.value
    assert repl.names().keys() == {"given", "mine", "show"}


def test_the_whole_text_comes_on_first_use_only(open_monty: Callable[..., REPLProtocol]) -> None:
    repl = open_monty(value_bytes=10_000)
    repl.bind("P", Context.from_text("p" * 5_000).whole)
    assert repl.exec("len(P)").value == "5000"
    repl.bind("Q", Context.from_text("q" * 20_000).whole)
    result = repl.exec("len(Q)")
    assert result.limit is not None
    assert (result.outcome, result.limit.kind, result.state) == ("limit", "value_bytes", "restored")
    assert repl.exec("len(P)").value == "5000"


# ---- the subset


@pytest.mark.parametrize(
    ("code", "feature"),
    [
        ("class E(Exception):\n    pass", "inheritance"),
        ("def g():\n    yield 1", "generators"),
        ("x = 1\ndel x", "del"),
        ("import enum", "imports"),
        ("globals()", "cpython"),
        ("@property\ndef f(): pass", "cpython"),
        ("x = '\\ud800'", "cpython"),
    ],
)
def test_what_the_subset_lacks_names_the_feature(repl: REPLProtocol, code: str, feature: str) -> None:
    error = repl.exec(code).error
    assert error is not None
    assert feature in error
    assert "use a backend whose capabilities list" in error


def test_setup_that_fails_is_a_guest_error() -> None:
    with pytest.raises(GuestError, match="division by zero"):
        open_repl("monty", setup="1 / 0")
    with pytest.raises(LimitExceeded):
        open_repl("monty", setup="while True: pass", limits=Limits(time_seconds=0.2))


# ---- the pool


def test_a_session_that_is_dropped_frees_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    from rlm_sandbox.backends.monty import pool

    monkeypatch.setattr(pool, "OPEN_SECONDS", 2.0)
    options = MontyOptions(max_processes=1)
    for _ in range(3):
        repl = open_repl("monty", options=options)
        assert repl.exec("1").value == "1"
        repl = None  # type: ignore[assignment]
        gc.collect()


# ---- Ctrl-C


def test_a_host_interrupt_ends_the_cell_and_not_the_session(open_monty: Callable[..., REPLProtocol]) -> None:
    repl = open_monty(time_seconds=60)
    repl.exec("x = 5")
    repl.get("x")
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    repl.bind("begun", timer.start)  # before the cell it would end the tests
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        repl.exec("begun()\nwhile True: pass")
    assert time.monotonic() - start < 40
    timer.join()
    result = repl.exec("x")
    assert (result.value, result.state) == ("5", "kept")


def test_handlers_of_other_signals_wait_for_the_engine_and_cost_the_cell_nothing(repl: REPLProtocol) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        result = repl.exec("import time\nend = time.monotonic() + 0.4\nwhile time.monotonic() < end:\n    pass\n'done'")
        timer.join()
        assert (result.outcome, result.value) == ("ok", "'done'")
        assert came == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_interrupt_from_another_thread(repl: REPLProtocol) -> None:
    repl.exec("x = 5")
    timer = threading.Timer(0.1, repl.interrupt)
    timer.start()
    result: ExecResult = repl.exec("while True: pass")
    timer.join()
    assert (result.outcome, result.state) == ("interrupted", "restored")


def test_a_crash_while_reading_is_raised(repl: REPLProtocol) -> None:
    repl.exec("class Slow:\n    def __repr__(self):\n        die()\n        return ''\nslow = Slow()")
    repl.bind("die", lambda: os.kill(worker_pid(repl), signal.SIGKILL))
    with pytest.raises((GuestCrashed, GuestError)):
        repl.get("slow")
    assert repl.exec("1").value == "1"
