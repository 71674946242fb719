"""Semantics 1, 3 and 4 of the design: a real REPL, readable tracebacks, and a cell that can never raise in the host."""

from __future__ import annotations

import re

import pytest

from rlm_sandbox import Feature, REPLProtocol

from ..conftest import OpenSession
from .support import MISSING, error_type, needs, ok, only_if, run

# ---- a real REPL


def test_names_persist_from_cell_to_cell(repl: REPLProtocol) -> None:
    ok(repl.exec("x = 40"))
    assert run(repl, "y = x + 2", "y") == 42


def test_names_bound_before_an_exception_stay(repl: REPLProtocol) -> None:
    result = repl.exec("a = 1\nb = [2]\nboom = 1 / 0\nc = 3")
    assert error_type(result) == "ZeroDivisionError"
    assert result.state == "kept"
    assert (repl.get("a"), repl.get("b"), repl.get("c", MISSING)) == (1, [2], MISSING)


def test_an_error_is_type_and_message(repl: REPLProtocol) -> None:
    result = repl.exec("raise ValueError('seven is not prime enough')")
    assert result.error == "ValueError: seven is not prime enough"
    assert not result.ok
    assert result.value is None


def test_the_session_works_after_an_error(repl: REPLProtocol) -> None:
    repl.exec("{}['nothing']")
    assert run(repl, "x = 1", "x") == 1


@needs(Feature.LATE_GLOBALS)
def test_a_function_sees_globals_made_later(repl: REPLProtocol) -> None:
    ok(repl.exec("def f():\n    return later + 1"))
    assert error_type(repl.exec("f()")) == "NameError"
    ok(repl.exec("later = 41"))
    assert run(repl, "r = f()", "r") == 42


def test_a_function_keeps_its_globals_up_to_date(repl: REPLProtocol) -> None:
    ok(repl.exec("n = 1\ndef f():\n    return n"))
    ok(repl.exec("n = 2"))
    assert run(repl, "r = f()", "r") == 2


def test_a_function_may_rebind_globals(repl: REPLProtocol) -> None:
    ok(repl.exec("count = 0\ndef step():\n    global count\n    count += 1"))
    assert run(repl, "step()\nstep()", "count") == 2


def test_recursion_across_cells(repl: REPLProtocol) -> None:
    ok(repl.exec("def fact(n):\n    return 1 if n < 2 else n * fact(n - 1)"))
    assert run(repl, "r = fact(20)", "r") == 2432902008176640000


def test_comprehensions_and_lambdas_see_globals(repl: REPLProtocol) -> None:
    ok(repl.exec("k = 3"))
    assert run(repl, "r = [x * k for x in range(3)] + [(lambda v: v + k)(1)]", "r") == [0, 3, 6, 4]


def test_everyday_syntax(repl: REPLProtocol) -> None:
    code = (
        "d = {'b': 2, 'a': 1}\n"
        "first, *rest = sorted(d)\n"
        "total = 0\n"
        "for i, (key, value) in enumerate(d.items()):\n"
        "    total += i * value\n"
        "text = f'{first}:{total:03d}:{rest!r}'\n"
        "if (n := len(text)) > 3 and 'a' in d:\n"
        "    r = (text.upper(), n, {*rest}, [x for x in range(5) if x % 2])\n"
    )
    assert run(repl, code, "r") == ("A:001:['B']", 11, {"b"}, [1, 3])


def test_the_modules_every_guest_has(repl: REPLProtocol) -> None:
    ok(repl.exec("import json\nimport math\nimport re"))
    code = "r = [json.loads('{\"a\": [1, null]}'), math.floor(2.5), re.findall(r'\\d+', 'a1b22')]"
    assert run(repl, code, "r") == [{"a": [1, None]}, 2, ["1", "22"]]


@needs(Feature.IMPORTS)
def test_imports_persist(repl: REPLProtocol) -> None:
    ok(repl.exec("import collections, heapq as h, zlib\nfrom textwrap import dedent"))
    code = "r = [h.nsmallest(1, [3, 1]), dedent('  a'), zlib.crc32(b'a'), collections.Counter('aab').most_common(1)]"
    assert run(repl, code, "r") == [[1], "a", 3904355907, [("a", 2)]]


@needs(Feature.CLASSES)
def test_classes_and_instances_persist(repl: REPLProtocol) -> None:
    ok(repl.exec("class Point:\n    def __init__(self, x):\n        self.x = x\n    def double(self):\n        return self.x * 2"))
    ok(repl.exec("p = Point(21)"))
    assert run(repl, "r = p.double()", "r") == 42


@needs(Feature.INHERITANCE)
def test_inheritance(repl: REPLProtocol) -> None:
    code = (
        "class Base:\n    def name(self):\n        return 'base'\n"
        "class Child(Base):\n    def name(self):\n        return 'child of ' + super().name()\n"
        "r = Child().name()"
    )
    assert run(repl, code, "r") == "child of base"


@needs(Feature.INHERITANCE)
def test_an_exception_class_of_the_guest(repl: REPLProtocol) -> None:
    ok(repl.exec("class Odd(ValueError):\n    pass"))
    result = repl.exec("raise Odd('three')")
    assert result.error == "Odd: three"


@needs(Feature.CLOSURES)
def test_closures_persist(repl: REPLProtocol) -> None:
    ok(repl.exec("def adder(n):\n    total = [n]\n    def add(x):\n        total[0] += x\n        return total[0]\n    return add"))
    ok(repl.exec("add = adder(1)\nadd(2)"))
    assert run(repl, "r = add(3)", "r") == 6


@needs(Feature.GENERATORS)
def test_a_half_used_generator_goes_on_in_the_next_cell(repl: REPLProtocol) -> None:
    ok(repl.exec("def numbers():\n    n = 0\n    while True:\n        yield n\n        n += 1"))
    ok(repl.exec("g = numbers()\nnext(g)\nnext(g)"))
    assert run(repl, "r = next(g)", "r") == 2


@needs(Feature.DEL)
def test_del(repl: REPLProtocol) -> None:
    ok(repl.exec("x = 1\nd = {'a': 1, 'b': 2}"))
    ok(repl.exec("del x, d['a']"))
    assert repl.get("x", MISSING) is MISSING
    assert repl.get("d") == {"b": 2}


@needs(Feature.MATCH)
def test_match(repl: REPLProtocol) -> None:
    code = "match {'kind': 'pair', 'of': [1, 2]}:\n    case {'kind': 'pair', 'of': [a, b]}:\n        r = a + b"
    assert run(repl, code, "r") == 3


@needs(Feature.TOP_LEVEL_AWAIT)
def test_top_level_await(repl: REPLProtocol) -> None:
    ok(repl.exec("async def f(x):\n    return x * 2"))
    assert run(repl, "r = await f(21)", "r") == 42


@needs(Feature.TOP_LEVEL_AWAIT, Feature.ASYNC)
def test_asyncio_in_several_cells(repl: REPLProtocol) -> None:
    ok(repl.exec("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x * 2"))
    assert list(run(repl, "r = await asyncio.gather(f(1), f(2))", "r")) == [2, 4]
    assert list(run(repl, "r = await asyncio.gather(f(3), f(4))", "r")) == [6, 8]


@needs(Feature.ASYNC)
def test_asyncio_run_works_too(repl: REPLProtocol) -> None:
    assert run(repl, "import asyncio\nasync def f():\n    return 7\nr = asyncio.run(f())", "r") == 7


@needs(Feature.THREADS)
def test_threads_of_the_guest(repl: REPLProtocol) -> None:
    code = (
        "import threading\nseen = []\n"
        "threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(4)]\n"
        "for t in threads:\n    t.start()\n"
        "for t in threads:\n    t.join()\n"
        "r = sorted(seen)"
    )
    assert run(repl, code, "r") == [0, 1, 2, 3]


@needs(Feature.FILES)
def test_tmp_is_writable_and_persists(repl: REPLProtocol) -> None:
    ok(repl.exec("with open('/tmp/note.txt', 'w') as f:\n    f.write('kept')"))
    assert run(repl, "with open('/tmp/note.txt') as f:\n    r = f.read()", "r") == "kept"


@needs(Feature.INPUT_EOF)
def test_input_is_at_its_end(repl: REPLProtocol) -> None:
    assert error_type(repl.exec("input('? ')")) == "EOFError"


def test_a_cell_runs_as_main(repl: REPLProtocol) -> None:
    assert run(repl, "r = 0\nif __name__ == '__main__':\n    r = 1", "r") == 1


@needs(Feature.CLASSES)
def test_dataclasses_and_typing_work_in_cells(repl: REPLProtocol) -> None:
    ok(
        repl.exec(
            "from dataclasses import dataclass, field\n@dataclass\nclass Hit:\n    at: int\n    tags: list[str] = field(default_factory=list)"
        )
    )
    assert run(repl, "r = repr(Hit(3))", "r") == "Hit(at=3, tags=[])"


# ---- echo


@needs(Feature.ECHO)
@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("1 + 2", "3"),
        ("x = 5\nx", "5"),
        ("x = 5; x", "5"),
        ("'a'", "'a'"),
        ("[1, 'two', None]", "[1, 'two', None]"),
        ("(\n  1,\n  2,\n)", "(1, 2)"),
        ("1 + 2  # with a comment\n# and another", "3"),
    ],
)
def test_the_last_expression_is_echoed(repl: REPLProtocol, code: str, value: str) -> None:
    result = ok(repl.exec(code))
    assert result.value == value
    assert result.stdout == ""


@pytest.mark.parametrize("code", ["x = 1", "None", "", "   \n\n", "# only a comment", "pass", "def f():\n    return 1"])
def test_what_has_no_value_echoes_nothing(repl: REPLProtocol, code: str) -> None:
    assert ok(repl.exec(code)).value is None


def test_a_call_that_returns_none_echoes_nothing(repl: REPLProtocol) -> None:
    assert ok(repl.exec("print('said')")).value is None


@needs(Feature.CLASSES, Feature.ECHO)
def test_a_repr_that_raises_is_the_cells_error(repl: REPLProtocol) -> None:
    result = repl.exec("class Bad:\n    def __repr__(self):\n        raise KeyError('no')\nkept = 1\nBad()")
    assert error_type(result) == "KeyError"
    assert repl.get("kept") == 1


# ---- results, whatever the cell does


@pytest.mark.parametrize("code", ["def f(:", "x = = 1", "'unclosed", "return 1", "if True:\nx = 1", "1 +"])
def test_a_syntax_error_is_a_result_and_nothing_ran(repl: REPLProtocol, code: str) -> None:
    result = repl.exec(f"ran = 1\n{code}")
    assert error_type(result) in ("SyntaxError", "IndentationError")
    assert result.state == "kept"
    assert repl.get("ran", MISSING) is MISSING


@pytest.mark.parametrize(
    "code",
    [
        "x = 1\0",
        "x = '\ud800'",
        "(" * 3_000 + ")" * 3_000,
        "-" * 50_000 + "1",
        "x" + ".a" * 50_000,
        "[" * 90 + "1" + "]" * 90,
        "\f\v x",
        "\ufeffx = 1",
    ],
    ids=["nul", "surrogate", "parentheses", "minus", "attributes", "lists", "whitespace", "bom"],
)
def test_odd_source_is_a_result(repl: REPLProtocol, code: str) -> None:
    ok(repl.exec("before = 1"))
    result = repl.exec(code)
    assert result.outcome in ("ok", "error", "limit", "crashed")
    if result.state != "lost":
        assert repl.get("before") == 1
    assert run(repl, "after = 2", "after") == 2


@needs(Feature.SYSTEM_EXIT)
@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("raise SystemExit(3)", "SystemExit"),
        ("raise SystemExit", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise KeyboardInterrupt('forged')", "KeyboardInterrupt"),
    ],
)
def test_exit_and_interrupt_raised_by_a_cell_are_errors(repl: REPLProtocol, code: str, name: str) -> None:
    result = repl.exec(f"kept = 1\n{code}")
    assert error_type(result) == name
    assert result.state == "kept"
    assert repl.get("kept") == 1


@needs(Feature.SYSTEM_EXIT, Feature.IMPORTS)
def test_sys_exit_is_an_error(repl: REPLProtocol) -> None:
    assert error_type(repl.exec("import sys\nsys.exit('bye')")) == "SystemExit"
    assert run(repl, "x = 1", "x") == 1


def test_endless_recursion_is_an_error(repl: REPLProtocol) -> None:
    ok(repl.exec("kept = 1\ndef f(n):\n    return f(n + 1)"))
    assert error_type(repl.exec("f(0)")) == "RecursionError"
    assert run(repl, "x = kept", "x") == 1


@needs(Feature.INHERITANCE)
def test_a_hostile_exception_is_a_result(repl: REPLProtocol) -> None:
    code = "class Evil(Exception):\n    def __str__(self):\n        raise SystemExit(9)\n    __repr__ = __str__\nraise Evil()"
    assert error_type(repl.exec(code)) == "Evil"
    assert run(repl, "x = 1", "x") == 1


def test_a_base_exception_is_a_result(repl: REPLProtocol) -> None:
    assert error_type(repl.exec("raise BaseException('base')")) == "BaseException"
    assert run(repl, "x = 1", "x") == 1


@needs(Feature.CPYTHON)
def test_an_exception_group_is_a_result(repl: REPLProtocol) -> None:
    assert error_type(repl.exec("raise ExceptionGroup('several', [ValueError('a'), KeyError('b')])")) == "ExceptionGroup"


def test_a_huge_error_message_is_bounded(repl: REPLProtocol) -> None:
    result = repl.exec("raise ValueError('x' * 5_000_000)")
    assert error_type(result) == "ValueError"
    assert result.error is not None
    assert len(result.error) < 1_000_000


# ---- tracebacks

_FRAME = re.compile(r'File "([^"]*)", line (\d+)')


@needs(Feature.SOURCE_TRACEBACKS)
def test_a_traceback_shows_the_cells_lines(repl: REPLProtocol) -> None:
    ok(repl.exec("def divide(a, b):\n    return a / b  # the line that fails"))
    result = repl.exec("x = 1\ny = divide(x, 0)")
    assert error_type(result) == "ZeroDivisionError"
    assert result.traceback is not None
    assert _FRAME.findall(result.traceback) == [("<cell 2>", "2"), ("<cell 1>", "2")]
    assert "y = divide(x, 0)" in result.traceback
    assert "return a / b  # the line that fails" in result.traceback
    assert result.traceback.rstrip().endswith("ZeroDivisionError: division by zero")


@needs(Feature.SOURCE_TRACEBACKS)
def test_cells_are_numbered_from_one(repl: REPLProtocol) -> None:
    for number in (1, 2, 3):
        traceback = repl.exec("undefined_name").traceback
        assert traceback is not None
        assert f'"<cell {number}>"' in traceback


@needs(Feature.SOURCE_TRACEBACKS)
def test_a_syntax_error_names_its_cell_and_line(repl: REPLProtocol) -> None:
    traceback = repl.exec("x = 1\ny = = 2").traceback
    assert traceback is not None
    assert _FRAME.findall(traceback) == [("<cell 1>", "2")]
    assert "y = = 2" in traceback


@only_if(lambda capabilities: capabilities.has(Feature.INHERITANCE), "its exceptions hold one text, and no cause")
def test_chained_exceptions_hold_guest_frames_only(repl: REPLProtocol) -> None:
    code = (
        "def inner():\n    raise KeyError('first')\ntry:\n    inner()\nexcept KeyError as e:\n    raise ValueError('second') from e"
    )
    traceback = repl.exec(code).traceback
    assert traceback is not None
    assert {name for name, _ in _FRAME.findall(traceback)} == {"<cell 1>"}
    assert "KeyError" in traceback
    assert "ValueError: second" in traceback


# ---- exec's own arguments


def test_read_brings_values_back_in_the_same_turn(repl: REPLProtocol) -> None:
    result = ok(repl.exec("answer = {'n': [1, 2]}\nother = 1", read=("answer", "not_there")))
    assert dict(result.read) == {"answer": {"n": [1, 2]}}


def test_read_sees_names_of_earlier_cells(repl: REPLProtocol) -> None:
    ok(repl.exec("answer = 42"))
    assert dict(ok(repl.exec("pass", read=("answer",))).read) == {"answer": 42}


@pytest.mark.parametrize("code", [b"x = 1", None, 3])
def test_code_must_be_text(repl: REPLProtocol, code: object) -> None:
    with pytest.raises(TypeError):
        repl.exec(code)  # type: ignore[arg-type]
    assert run(repl, "x = 1", "x") == 1


def test_read_must_be_a_tuple_of_names(repl: REPLProtocol) -> None:
    with pytest.raises(TypeError):
        repl.exec("x = 1", read="x")  # type: ignore[arg-type]
    assert repl.get("x", MISSING) is MISSING


def test_limits_must_be_limits(repl: REPLProtocol) -> None:
    with pytest.raises(TypeError):
        repl.exec("x = 1", limits={"time_seconds": 1})  # type: ignore[arg-type]
    assert repl.get("x", MISSING) is MISSING


def test_sessions_do_not_share_names(open_session: OpenSession) -> None:
    one, two = open_session(), open_session()
    ok(one.exec("x = 1"))
    ok(two.exec("x = 2"))
    assert (one.get("x"), two.get("x")) == (1, 2)
    assert two.get("y", MISSING) is MISSING


# ---- what every guest finds


def test_session_names_lists_the_variables(repl: REPLProtocol) -> None:
    ok(repl.exec("alpha = [1, 2, 3]\nbeta = 'text'"))
    listed = run(repl, "listed = session_names()", "listed")
    assert isinstance(listed, dict)
    assert {"alpha", "beta"} <= set(listed)
    assert "session_names" not in listed
    assert all(isinstance(summary, str) and summary for summary in listed.values())
