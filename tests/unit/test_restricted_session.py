"""`restricted` in the host's process: how it opens, what it refuses, and that it leaves the host as it was."""

from __future__ import annotations

import gc
import linecache
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlm_sandbox import BackendUnavailable, Context, ExecResult, Feature, Grade, Limits, REPLProtocol, UnsupportedLimit, open_repl
from rlm_sandbox.registry import AUTO_ORDER, Availability, SessionConfig, load_backend

from ..conftest import require_usable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    try:
        state = load_backend("restricted").probe()
    except BackendUnavailable as exc:
        state = Availability(False, exc.reason, exc.remedy)
    require_usable("restricted", state)


@pytest.fixture
def repl() -> Iterator[REPLProtocol]:
    with open_repl("restricted", limits=Limits(time_seconds=2), accept=Grade.NONE, trusted=True) as session:
        yield session


def test_it_opens_for_trusted_code_only() -> None:
    for accept, trusted in ((Grade.HARD, True), (Grade.COOPERATIVE, True), (Grade.NONE, False)):
        with pytest.raises(UnsupportedLimit):
            open_repl("restricted", accept=accept, trusted=trusted)
    with open_repl("restricted", limits=Limits(memory_mb=None), accept=Grade.COOPERATIVE, trusted=True) as repl:
        assert repl.exec("1 + 1").value == "2"
    assert "restricted" not in AUTO_ORDER


def test_the_same_sentence_everywhere() -> None:
    sentence = load_backend("restricted").capabilities(SessionConfig()).isolation
    assert sentence == "none against an adversary"
    for page in ("README.md", "SECURITY.md", "docs/limitations/restricted.md"):
        assert sentence in (ROOT / page).read_text("utf-8")


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("d = {'a': 1}\nd['a'] += 2\nd['b'] = d.get('b', 0) + 1\nd", "{'a': 3, 'b': 1}"),
        ("n: int = 3\ndef f(a: 'text', b: list[int] = []) -> dict:\n    return n\nf(1)", "3"),
        ("def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n        return n\n    g()\n    return g()\nf()", "2"),
        ("class A:\n    n = 0\n    def __init__(self):\n        self._x = 1\n        self.n += 2\na = A()\na.n += 1\n(a._x, a.n)", "(1, 3)"),
        ("'{0:>5}|{name!r}|{1[0]}|{2.real}'.format('x', [7], 3, name='n')", "\"    x|'n'|7|3\""),
        ("f'{1/3:.2f} {\"a\":>{3}}'", "'0.33   a'"),
        ("class P:\n    def __init__(self, x):\n        self.x = x\nmatch P(3):\n    case P(x=n):\n        r = n\nr", "3"),
        ("class P:\n    def __repr__(self):\n        return self.__class__.__name__ + str(sorted(self.__dict__))\nP()", "P[]"),
        ("from collections import namedtuple\nT = namedtuple('T', 'a b')\n(T(1, 2)._asdict(), T(1, 2)._replace(a=3))", "({'a': 1, 'b': 2}, T(a=3, b=2))"),
        ("from dataclasses import dataclass\n@dataclass(order=True)\nclass D:\n    a: 'int'\n    b: int = 2\nsorted([D(3), D(1)])", "[D(a=1, b=2), D(a=3, b=2)]"),
        ("import functools\n@functools.lru_cache(maxsize=None)\ndef f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nf(40)", "102334155"),
        ("import csv, io\nlist(csv.DictReader(io.StringIO('a,b\\n1,2')))", "[{'a': '1', 'b': '2'}]"),
        ("class E(ValueError):\n    def __init__(self, n):\n        super().__init__('no ' + str(n))\ntry:\n    raise E(3)\nexcept E as e:\n    r = str(e)\nr", "'no 3'"),
        ("(lambda *a, **k: (a, k))(*[1, 2], **{'z': 3})", "((1, 2), {'z': 3})"),
        ("a, (b, *c) = 1, (2, 3, 4)\n[x + y for x, y in zip([a, b], c)]", "[4, 6]"),
        ("max(range(10 ** 7), default=0), sum(x for x in range(5)), sum(map(len, ['a', 'bc'])), any([]), sorted({3, 1})", "(9999999, 10, 3, False, [1, 3])"),
        (("class P:\n    __n = 0\n    def __init__(self, x):\n        self.__x = x\n        P.__n += 1\n    def __get(self):\n        return self.__x\n"
          "    def get(self):\n        return self.__get(), self.__n\np = P(4)\np.get(), p._P__x, sorted(p.__dict__)"), "((4, 1), 4, ['_P__x'])"),
        (("class P:\n    def __init__(self):\n        self.__x = 1\nclass Q(P):\n    def __init__(self):\n        super().__init__()\n        self.__x = 2\n"
          "    def both(self):\n        return self.__x, self._P__x\nQ().both()"), "(2, 1)"),
        (("from enum import Enum, auto\nclass C(Enum):\n    RED = 1\n    BLUE = auto()\n    def low(self):\n        return self.name.lower()\n"
          "C.RED, C(2), C['RED'].low(), len(list(C)), C.RED is C(1), type(C.RED) is C"), "(<C.RED: 1>, <C.BLUE: 2>, 'red', 2, True, True)"),
        (("from enum import IntEnum, StrEnum, Flag, unique\n@unique\nclass L(IntEnum):\n    A = 1\n    B = 2\nclass F(Flag):\n    R = 1\n    W = 2\n"
          "class S(StrEnum):\n    X = 'x'\nmax(L), L.A + 1, F.R in (F.R | F.W), S.X == 'x', f'{L.B}'"), "(<L.B: 2>, 2, True, True, '2')"),
        ("from enum import Enum\nE = Enum('E', 'A B')\n[E.A.value, list(Enum('G', {'X': 5}))]", "[1, [<G.X: 5>]]"),
        ("from contextlib import contextmanager\n@contextmanager\ndef c():\n    yield 5\nwith c() as n:\n    pass\nn", "5"),
    ],
)  # fmt: skip
def test_what_models_write_works(repl: REPLProtocol, code: str, value: str) -> None:
    result = repl.exec(code)
    assert (result.outcome, result.error, result.value) == ("ok", None, value)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("x = 1\nasync def f():\n    pass", 2),
        ("x = 1\n\nawait x", 3),
        ("async with x:\n    pass", 1),
        ("class P:\n    pass\np = P()\np.__x = 1", 4),
        ("def f(__x):\n    pass", 1),
        ("x = []\n\nx.__class__ = 3", 3),
        ("class C(metaclass=type):\n    pass", 1),
        ("try:\n    pass\nexcept* ValueError:\n    pass", 1),
        ("class C:\n    def __del__(self):\n        pass", 2),
        ("super(int, 1)", 1),
        ("f'{1:>100000000}'", 1),
        ("'%99999999d' % 1", 1),
    ],
)
def test_what_is_refused_names_its_line_and_where_to_go(repl: REPLProtocol, code: str, line: int) -> None:
    result = repl.exec(f"{code}\nran = 1")
    assert result.outcome == "error"
    assert result.error is not None
    assert result.error.startswith(f"SyntaxError: line {line}: ")
    assert "(docker, jail, wasm)" in result.error
    assert repl.get("ran") is None


def test_the_backends_that_are_named_have_what_was_refused() -> None:
    for name in ("docker", "jail", "wasm"):
        try:
            assert load_backend(name).capabilities(SessionConfig()).has(Feature.CPYTHON)
        except BackendUnavailable:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("code", ["import sys\nsys.exit(3)", "exit(3)", "quit(3)"])
def test_an_exit_ends_its_cell(repl: REPLProtocol, code: str) -> None:
    assert repl.exec("kept = 1").ok
    result = repl.exec(f"{code}\nkept = 2")
    assert (result.outcome, result.error) == ("error", "SystemExit: 3")
    assert repl.get("kept") == 1


@pytest.mark.parametrize(
    "code",
    [
        "import fractions\ntype(fractions.Fraction)('X', (), {'__del__': 1})",
        "import enum\ntype(enum.Enum)('X', (), {'__del__': 1})",
        "import enum\nenum.Enum('X', [('__del__', 1)])",
        "import enum\nenum.Enum('X', {'__getattribute__': 1})",
        "import enum\nclass E(enum.Enum):\n    A = 1\n    def __del__(self):\n        pass",
        "import enum\nenum.auto.value = 1",
        "import enum\nenum.Enum.__members__",
        "import enum\nenum.Enum._missing_.__globals__",
    ],
)
def test_no_metaclass_is_a_way_around_the_rules_of_classes(repl: REPLProtocol, code: str) -> None:
    assert repl.exec(code).outcome == "error"


@pytest.mark.parametrize(
    "code",
    [
        "'a' * 10 ** 11", "[0] * 10 ** 11", "n = 10 ** 9\n2 ** n", "n = 10 ** 9\n1 << n", "list(range(10 ** 12))", "bytes(10 ** 12)",
        "'{:>99999999}'.format(1)", "format(1, '>99999999')", "import math\nmath.factorial(10 ** 6)", "set(range(10 ** 12))",
    ],
)  # fmt: skip
def test_one_operation_of_too_much_is_an_error(repl: REPLProtocol, code: str) -> None:
    assert repl.exec(code).outcome == "error"
    assert repl.exec("1").ok


def test_an_endless_iterator_ends_in_time_on_any_thread() -> None:
    outcomes = []

    def run() -> None:
        with open_repl("restricted", limits=Limits(time_seconds=0.2), accept=Grade.NONE, trusted=True) as repl:
            for code in (
                "max(itertools.count())",
                "list(itertools.repeat(1))",
                "sorted(itertools.cycle('a'))",
                "sum(iter(int, 1))",
            ):
                outcomes.append(repl.exec(f"import itertools\n{code}").outcome)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert set(outcomes) <= {"limit", "error"}
    assert outcomes[0] == outcomes[3] == "limit"


def test_the_host_is_left_as_it_was(repl: REPLProtocol) -> None:
    before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGVTALRM), set(linecache.cache))
    repl.exec("def f():\n    1 / 0\nf()")
    repl.exec("while True:\n    pass", limits=Limits(time_seconds=0.1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGVTALRM)) == before[:2]
    assert not [name for name in set(linecache.cache) - before[2] if name.startswith("<")]
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # how Python tells that a finalizer was ended
def test_what_outlives_its_cell_ends_at_its_first_step() -> None:
    """A generator's ``finally`` that runs when the session lets go of it does not run on unwatched."""
    with open_repl("restricted", limits=Limits(time_seconds=1), accept=Grade.NONE, trusted=True) as repl:
        assert repl.exec(
            "def g():\n    try:\n        yield 1\n    finally:\n        while True:\n            pass\nx = g()\nnext(x)"
        ).ok
    gc.collect()


def test_a_host_object_is_reached_by_its_list_only(repl: REPLProtocol) -> None:
    repl.bind("ctx", Context.from_text("a needle", metadata={"k": [1]}))
    assert repl.exec("ctx.find('n.e', regex=True)").value == "[(2, 5, 'nee')]"
    for code in ("ctx._text", "ctx.memory_file()", "ctx.text", "ctx.whole", "type(ctx)._context", "ctx.find(pattern=['a'])"):
        assert repl.exec(code).outcome == "error"


_FOR_EVER = {
    "while": "while True:\n    pass",
    "while, continue": "while True:\n    continue",
    "for": "for _ in iter(int, 1):\n    pass",
    "list comprehension": "x = [i for i in iter(int, 1)]",
    "dict comprehension": "x = {i: i for i in iter(int, 1)}",
    "generator expression": "for i in (i for i in iter(int, 1)):\n    pass",
    "generator": "def g():\n    while True:\n        yield 1\nfor i in g():\n    pass",
    "a generator that a loop in C takes": "def g():\n    while True:\n        yield 0\nx = sum(g())",
    "calls": "def f(n):\n    return f(n - 1) if n else 0\nwhile f(50) == 0:\n    pass",
    "calls of calls": "f = lambda n: 0 if n == 0 else f(n - 1) + f(n - 1)\nf(60)",
    "recursion that swallows its end": "def f():\n    try:\n        f()\n    except RecursionError:\n        pass\n    f()\nf()",
    "bare except": "while True:\n    try:\n        while True:\n            pass\n    except:\n        pass",
    "except BaseException": "while True:\n    try:\n        while True:\n            pass\n    except BaseException as e:\n        kept = e",
    "except in a function": "def f():\n    try:\n        while True:\n            pass\n    except BaseException:\n        f()\nf()",
    "finally": "try:\n    while True:\n        pass\nfinally:\n    while True:\n        pass",
    "finally, return": "def f():\n    while True:\n        try:\n            while True:\n                pass\n        finally:\n            continue\nf()",
    "else": "while True:\n    try:\n        pass\n    except BaseException:\n        pass\n    else:\n        pass",
    "suppress": "import contextlib\nwhile True:\n    with contextlib.suppress(BaseException):\n        while True:\n            pass",
    "exit": "class C:\n    def __enter__(self):\n        pass\n    def __exit__(self, *a):\n        return True\nwhile True:\n    with C():\n        while True:\n            pass",
    "a generator's except": "def g():\n    while True:\n        try:\n            yield 1\n        except BaseException:\n            pass\nfor i in g():\n    pass",
    "a key": "sorted([3, 1, 2] * 10 ** 6, key=lambda n: [n for _ in range(1_000)][0])",
    "an operator": "class C:\n    def __eq__(self, other):\n        return self == other if False else [1 for _ in range(10 ** 9)]\nC() == 1",
    "a repr": "class C:\n    def __repr__(self):\n        while True:\n            pass\nC()",
    "a repr of an error": "class E(Exception):\n    def __str__(self):\n        while True:\n            pass\nraise E",
    "a match": "while True:\n    match 1:\n        case _:\n            pass",
    "a stop that is raised": "while True:\n    try:\n        while True:\n            pass\n    except BaseException as e:\n        try:\n            raise e\n"
    "        except BaseException:\n            pass",
    "sleep": "import time\nwhile True:\n    try:\n        time.sleep(100)\n    except BaseException:\n        pass",
    "output": "while True:\n    try:\n        print('x' * 1_000)\n    except BaseException:\n        pass",
    "a host call": "while True:\n    try:\n        ask('x')\n    except BaseException:\n        pass",
}  # fmt: skip


# A stop that meets a generator while it is closed is reported by Python, and not raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "other thread"])
@pytest.mark.parametrize("code", _FOR_EVER.values(), ids=_FOR_EVER)
def test_the_deadline_is_sticky(code: str, thread: bool) -> None:
    """On any other thread than the main one there is no signal: what ends the cell is what it looks at by itself."""
    results: list[ExecResult] = []

    def run() -> None:
        limits = Limits(time_seconds=0.1, host_calls=None)
        with open_repl("restricted", limits=limits, accept=Grade.NONE, trusted=True) as repl:
            repl.bind("ask", str.upper, inline=True)
            assert repl.exec("kept = 1").ok
            results.append(repl.exec(code))
            assert repl.get("kept") == 1
            results.append(repl.exec("kept + 1"))

    if thread:
        runner = threading.Thread(target=run, daemon=True)
        runner.start()
        runner.join(60)
        assert not runner.is_alive()
    else:
        run()
    stopped, after = results
    assert stopped.outcome == "limit", stopped.error
    assert stopped.limit is not None
    assert stopped.limit.kind == "time_seconds"
    assert stopped.state == "kept"
    assert after.value == "2"


def test_the_deadline_outlives_a_host_call_that_was_longer() -> None:
    """The clock stands still in a host call. It was looked at there, found without a deadline to come, and never again."""
    results: list[ExecResult] = []

    def run() -> None:
        with open_repl("restricted", limits=Limits(time_seconds=0.1), accept=Grade.NONE, trusted=True) as repl:
            for inline in (True, False):
                repl.bind("ask", lambda: time.sleep(0.4), inline=inline)
                results.append(repl.exec("ask()\nwhile True:\n    pass"))

    runner = threading.Thread(target=run, daemon=True)  # on the main thread a signal would end it
    runner.start()
    runner.join(60)
    assert [result.limit and result.limit.kind for result in results] == ["time_seconds"] * 2


def test_output_is_metered_while_it_is_produced() -> None:
    """200 MB are written; the host never holds more than the limit and one piece."""
    tracemalloc.start()
    try:
        with open_repl("restricted", limits=Limits(output_bytes=10_000), accept=Grade.NONE, trusted=True) as repl:
            result = repl.exec("piece = 'x' * 99_999\nfor _ in range(2_000):\n    print(piece)")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.ok
    assert len(result.stdout) < 12_000
    assert result.dropped_bytes > 190_000_000
    assert peak < 20_000_000
