"""What a guest may try with host functions and objects, and what host functions may do to a session, beyond the ordinary."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from rlm_sandbox import Context, Feature, Limits, REPLProtocol, expose

from ..conftest import OpenSession
from .support import PATIENCE_SECONDS, enforces, needs, ok, run, within

SECRET = "hunter2 in /home/alice"
TEXT = "alpha beta gamma\nthe needle is here\n"


def tries(repl: REPLProtocol, call: str) -> Any:
    """What the call comes to in the guest: ["returned", type name] or ["raised", message]; nothing of it harms the session."""
    code = (
        f"try:\n    r = ['returned', type({call}).__name__]\n"
        "except Exception as e:\n    r = ['raised', type(e).__name__ + ': ' + str(e)[:500]]\n"
    )
    result = repl.exec(code)
    assert result.outcome in ("ok", "limit"), f"{call}: {result.outcome}: {result.error}"
    assert "hunter2" not in f"{result}"
    found = repl.get("r")
    assert "hunter2" not in f"{found}"
    return found


# ---- arguments


@needs(Feature.CLASSES, Feature.INHERITANCE)
def test_subclass_instances_arrive_as_their_plain_base(repl: REPLProtocol) -> None:
    seen: list[Any] = []
    repl.bind("f", seen.append)
    ok(
        repl.exec(
            "class S(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
            "class I(int):\n    def __index__(self): return 10**9\n"
            "class L(list):\n    def __iter__(self): return iter(['forged'])\n"
            "class D(dict):\n    def items(self): return [('forged', 1)]\n"
            "for value in (S('text'), I(3), L([1]), D(a=1)):\n    f(value)\n"
        )
    )
    assert seen == ["text", 3, [1], {"a": 1}]
    assert [type(value) for value in seen] == [str, int, list, dict]


@pytest.mark.parametrize(
    "argument",
    [
        "x",
        "[x]",
        "{'k': x}",
        "'a' * 3_000_000",
        "b'a' * 3_000_000",
        "[['a' * 600] * 5_000]",
        "list(range(2_000_000))",
        "1 << 30_000_000",
    ],
)
def test_huge_and_deep_arguments_are_refused_in_the_guest(open_session: OpenSession, argument: str) -> None:
    repl = open_session(limits=Limits(value_bytes=1 << 20))
    called: list[Any] = []
    repl.bind("f", lambda value: called.append(value))
    ok(repl.exec("x = []\nfor _ in range(80):\n    x = [x]"))
    outcome = tries(repl, f"f({argument})")
    if repl.get("r") is not None:
        assert outcome[0] == "raised" or repl.exec("1").ok
    assert called == []
    assert run(repl, "y = 1", "y") == 1


def test_a_value_that_holds_itself_is_refused(repl: REPLProtocol) -> None:
    called: list[Any] = []
    repl.bind("f", called.append)
    ok(repl.exec("x = []\nx.append(x)"))
    tries(repl, "f(x)")
    assert all(type(value) is not list or len(value) < 2 for value in called), "not unrolled"


_SIZES = (
    "-1",
    "-10**9",
    "0",
    "10**9",
    "10**30",
    "-(10**30)",
    "1.5",
    "float('nan')",
    "float('inf')",
    "True",
    "None",
    "'3'",
    "b'3'",
    "[3]",
    "{}",
)
_CALLS = (
    "c.slice({0}, 5)",
    "c.slice(0, {0})",
    "c.chunk({0})",
    "c.chunk(5, overlap={0})",
    "c.get_document({0})",
    "c.chunk_documents({0})",
    "c.page({0})",
    "c.find('a', max_matches={0})",
    "c.find('a', start={0})",
    "c.find({0})",
    "c[{0}]",
)


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("where", ["bound", "returned"])
def test_wild_sizes_are_an_answer_or_an_error(repl: REPLProtocol, call: str, where: str) -> None:
    """The text is in the guest where it can be mapped; one that a host function returns is always on the host."""
    context = Context.from_documents([TEXT, "second"])
    if where == "bound":
        repl.bind("c", context)
    else:
        repl.bind("give", lambda: context)
        ok(repl.exec("c = give()"))
    with within(5):
        for size in _SIZES:
            assert tries(repl, call.format(size))[0] in ("returned", "raised")
    assert run(repl, "n = c.len_chars()", "n") == len(context.text)


# ---- names


class Host:
    """A host object that is awkward to handle."""

    size = 1

    def ask(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        raise KeyError(SECRET)

    @property
    def broken(self) -> int:
        raise RuntimeError(SECRET)

    def __len__(self) -> int:
        raise RuntimeError(SECRET)

    def __getitem__(self, key: Any) -> Any:
        raise RuntimeError(SECRET)

    def __iter__(self) -> Any:
        raise RuntimeError(SECRET)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError(SECRET)

    __hash__ = object.__hash__

    def __str__(self) -> str:
        raise RuntimeError(SECRET)

    __repr__ = __str__


@pytest.mark.parametrize(
    "call",
    ["h.broken", "len(h)", "h[1]", "list(h)", "h == 1", "str(h)", "h.missing", "h.__getattr__('x')", "h._x", "h.ask.__self__"],
)
def test_no_text_of_a_host_exception_reaches_the_guest(repl: REPLProtocol, call: str) -> None:
    repl.bind(
        "h", expose(Host(), methods=("ask",), attributes=("size", "broken"), operators=("len", "getitem", "iter", "eq", "str"))
    )
    tries(repl, call)
    assert run(repl, "n = h.ask()", "n") == 1


def test_a_method_that_cannot_be_read_any_more_is_refused(repl: REPLProtocol) -> None:
    """Reading it runs code of the host object, which may raise anything, on the thread that called `exec`."""

    class Changes:
        broken = False

        def __getattribute__(self, name: str) -> Any:
            if name == "ask" and object.__getattribute__(self, "broken"):
                raise KeyError(SECRET)
            return object.__getattribute__(self, name)

        def ask(self) -> int:
            return 1

    host = Changes()
    repl.bind("h", expose(host, methods=("ask",)))
    assert run(repl, "n = h.ask()", "n") == 1
    host.broken = True
    assert tries(repl, "h.ask()")[0] == "raised"
    host.broken = False
    assert run(repl, "n = h.ask()", "n") == 1


def test_an_allowed_error_may_quote_anything(repl: REPLProtocol) -> None:
    """Also a lone surrogate, which came from the guest: that is no breach of the protocol by the guest."""
    repl.bind("f", lambda: (_ for _ in ()).throw(ValueError("no such key \ud800 \x00 \x1b[2J")), errors=(ValueError,))
    assert "no such key" in tries(repl, "f()")[1]
    assert run(repl, "n = 1", "n") == 1


# ---- results


class Odd:
    """Neither plain nor kind to who looks at it."""

    __module__ = "numpy"

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(SECRET)

    def __repr__(self) -> str:
        raise RuntimeError(SECRET)


class Changing(dict[str, int]):
    pass


def _deep() -> Any:
    value: Any = []
    for _ in range(100):
        value = [value]
    return value


_loop: list[Any] = []
_loop.append(_loop)


@pytest.mark.parametrize(
    "made",
    [
        Odd(),
        [Odd()],
        {"k": Odd()},
        {Odd(): 1},
        _deep(),
        _loop,
        "x" * 3_000_000,
        list(range(2_000_000)),
        (n for n in (1, 2)),
        iter([]),
        {1j: 1},
    ],
    ids=["odd", "odd in a list", "odd value", "odd key", "deep", "loop", "long", "many", "generator", "iterator", "complex key"],
)
def test_a_result_that_cannot_be_sent_fails_its_call_only(open_session: OpenSession, made: Any) -> None:
    repl = open_session(limits=Limits(value_bytes=1 << 20))
    repl.bind("f", lambda: made)
    repl.bind("g", lambda: [1, 2])
    assert tries(repl, "f()")[0] == "raised"
    assert run(repl, "n = g()", "n") == [1, 2]


def test_a_result_that_another_thread_changes_fails_its_call_at_most(repl: REPLProtocol) -> None:
    shared = {n: n for n in range(2_000)}
    stop = threading.Event()

    def change() -> None:
        n = 10_000
        while not stop.is_set():
            n += 1
            shared[n] = n
            shared.pop(n - 50, None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        repl.bind("f", lambda: shared)
        for _ in range(20):
            assert tries(repl, "f()")[0] in ("returned", "raised")
    finally:
        stop.set()
        thread.join()
    assert run(repl, "n = 1", "n") == 1


@needs(Feature.THREADS)
def test_one_refused_result_does_not_spoil_those_that_come_with_it(repl: REPLProtocol) -> None:
    barrier = threading.Barrier(8)

    def f(n: int) -> Any:
        barrier.wait(20)
        return {(object(),): 1} if n % 2 else [n, [n]]

    repl.bind("f", f)
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def g(n):\n    try:\n        return f(n)\n    except HostCallError:\n        return 'refused'\n"
        "with ThreadPoolExecutor(8) as pool:\n    r = list(pool.map(g, range(8)))"
    )
    assert run(repl, code, "r") == ["refused" if n % 2 else [n, [n]] for n in range(8)]


# ---- after the end


@needs(Feature.THREADS)
def test_a_thread_that_outlives_its_cell_calls_nothing_between_cells(repl: REPLProtocol) -> None:
    calls: list[float] = []
    repl.bind("f", lambda: calls.append(time.monotonic()))
    ok(
        repl.exec(
            "import threading, time\ndef loop():\n    while True:\n        try:\n            f()\n        except HostCallError:\n"
            "            pass\n        time.sleep(0.001)\nthreading.Thread(target=loop, daemon=True).start()\ntime.sleep(0.05)"
        )
    )
    time.sleep(0.5)  # calls that had begun have ended
    ended = time.monotonic()
    time.sleep(0.3)
    assert not [at for at in calls if at > ended]
    result = repl.exec("n = 1")
    assert result.outcome == "ok", result
    assert repl.get("n") == 1


@needs(Feature.THREADS)
def test_threads_that_go_on_cost_the_session_nothing(repl: REPLProtocol) -> None:
    """Each cell ends with its recovery point made, however busy they are just then."""
    loops = ("while True:\n        time.sleep(0.001)", "while True:\n        sum(range(1000)); time.sleep(0)")
    for body in loops:
        ok(repl.exec(f"import threading, time\ndef loop():\n    {body}\nthreading.Thread(target=loop, daemon=True).start()"))
    for n in range(12):
        ok(repl.exec(f"n = {n}"))
        assert repl.get("n") == n


@enforces("wall_seconds")
def test_functions_that_never_return_cost_a_cell_each_and_not_the_session(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(wall_seconds=0.4))
    release = threading.Event()
    repl.bind("never", release.wait)
    repl.bind("f", lambda: 1)
    try:
        for _ in range(3):
            assert repl.exec("never()").outcome == "limit"
            assert run(repl, "n = f()", "n") == 1
    finally:
        release.set()


def test_nested_sessions_three_deep(open_session: OpenSession) -> None:
    def open_next(depth: int) -> list[int]:
        if depth == 3:
            return [depth]
        inner = open_session()
        try:
            inner.bind("deeper", open_next)
            found: list[int] = run(inner, f"r = [{depth}] + deeper({depth + 1})", "r")
            return found
        finally:
            inner.close()

    with within(PATIENCE_SECONDS):
        assert open_next(0) == [0, 1, 2, 3]


@needs(Feature.THREADS)
def test_every_call_of_a_full_pool_may_open_a_session(open_session: OpenSession) -> None:
    """More calls at once than the pool has threads, each with a session of its own."""

    def nested(n: int) -> int:
        inner = open_session()
        try:
            return int(run(inner, f"r = {n} * 2", "r"))
        finally:
            inner.close()

    repl = open_session()
    repl.bind("f", nested)
    code = "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(12) as pool:\n    r = list(pool.map(f, range(12)))"
    assert run(repl, code, "r") == [n * 2 for n in range(12)]
