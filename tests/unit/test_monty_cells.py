"""What the monty backend reads in a cell's source before the engine gets it."""

from __future__ import annotations

import ast

import pytest

from rlm_sandbox.registry import load_backend


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    pytest.importorskip("pydantic_monty")
    load_backend("monty")


OBJECTS = {"ctx": ("bool", "contains", "getitem", "iter", "len")}


def rewritten(code: str) -> str:
    """The source as the engine gets it, without the echo."""
    from rlm_sandbox.backends.monty.cells import read_cell

    cell = read_cell(code + "\npass", OBJECTS)
    assert not cell.problem
    ast.parse(cell.source)
    assert cell.source.count("\n") == code.count("\n") + 1, "line numbers stay right"
    return cell.source.removesuffix("\npass")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("n = len(ctx)", "n = ctx.rlm_len()"),
        ("s = ctx[1:2]", "s = ctx.rlm_slice(1, 2, None)"),
        ("s = ctx[:]", "s = ctx.rlm_slice(None, None, None)"),
        ("s = ctx[(1):(2)]", "s = ctx.rlm_slice(1, 2, None)"),
        ("s = ctx[\n 1:\n 2]", "s = ctx.rlm_slice(\n1, \n2, None)"),
        ("s = ctx[len(ctx) - 10:]", "s = ctx.rlm_slice(ctx.rlm_len() - 10, None, None)"),
        ("c = ctx[-1]", "c = ctx.rlm_getitem(-1)"),
        ("b = 'é' in ctx", "b = ctx.rlm_contains('é')"),
        ("b = ('a') not in ctx and len( ctx ) > 3", "b = (not ctx.rlm_contains('a')) and ctx.rlm_len() > 3"),
        ("d = [x for x in ctx if x in ctx]", "d = [x for x in ctx.rlm_iter() if ctx.rlm_contains(x)]"),
        ("for d in ctx: pass", "for d in ctx.rlm_iter(): pass"),
        ("d = list(ctx)", "d = list(ctx.rlm_iter())"),
        ("é = 'ü'; s = ctx[len(ctx):]", "é = 'ü'; s = ctx.rlm_slice(ctx.rlm_len(), None, None)"),
    ],
)
def test_operators_of_a_bound_object_become_method_calls(code: str, expected: str) -> None:
    assert rewritten(code) == expected


@pytest.mark.parametrize(
    "code",
    [
        "n = len(other)",
        "ctx = [1]\nn = len(ctx)",
        "def f(ctx):\n    return len(ctx)",
        "b = 'a' in ctx == True",
        "n = len(ctx, 1)",
        "s = 'len(ctx)'  # len(ctx)",
    ],
)
def test_everything_else_stays(code: str) -> None:
    assert rewritten(code) == code


def test_the_last_expression_is_echoed() -> None:
    from rlm_sandbox.backends.monty.cells import ECHO, read_cell

    assert read_cell("x = 1\n1, 2  # two", {}).source == f"x = 1\n{ECHO}((1, 2))  # two"
    assert (
        read_cell("(a\n + b)", {}).source == f"{ECHO}(((a\n + b)))" or read_cell("(a\n + b)", {}).source == f"({ECHO}((a\n + b)))"
    )
    assert not read_cell("x = 1", {}).echoes


def test_names_a_cell_binds() -> None:
    from rlm_sandbox.backends.monty.cells import read_cell

    code = (
        "import os.path, json as j\na, (b, *c) = 1, (2, 3)\nfor d in (): pass\nwith x as e: pass\ndef f(p):\n    global g\n    local = 1\n"
        "class H:\n    attribute = 1\n[i for i in a if (k := i)]\nmatch a:\n    case [m, *n]: pass\n    case {'q': r, **s}: pass\n"
        "t: int = 1\nu += 1"
    )
    assert read_cell(code, {}).names == set("abcdefgjkmnrstu") | {"os", "H"}


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("return 1", "SyntaxError"),
        ("if x:\n    return 1", "SyntaxError"),
        ("x = '\\ud800'", "ValueError"),
        ("x = '\ud800'", "SyntaxError"),
    ],
)
def test_what_the_engine_would_take_wrongly_is_refused(code: str, problem: str) -> None:
    from rlm_sandbox.backends.monty.cells import read_cell

    assert read_cell(code, {}).problem.startswith(f"{problem}: ")


@pytest.mark.parametrize("code", ["x = (", "(" * 5_000, "-" * 50_000 + "1", "1" + "+1" * 30_000, "x = 1\n" * 60_000, "a\x00b"])
def test_source_the_host_cannot_read_goes_on_unread(code: str) -> None:
    from rlm_sandbox.backends.monty.cells import read_cell

    assert read_cell(code, OBJECTS).source == code


def test_exceptions_get_text() -> None:
    assert rewritten("raise SystemExit(3)") == "raise SystemExit(str((3)))"
    assert rewritten("raise ValueError('text')") == "raise ValueError('text')"
    assert rewritten("raise Mine(3)") == "raise Mine(3)"
