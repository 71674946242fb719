"""The guest's functions on CPython, and on a bare interpreter of the small subset where it is installed."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from rlm_sandbox import Context
from rlm_sandbox.orchestrator.run import prelude_source

TEXT = "".join(chr(ord("a") + index % 26) for index in range(5000))


class Guest:
    """The prelude run by CPython's own ``exec``, as a session would."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"ctx": Context.from_text(TEXT), "session_names": lambda: {"x": "int: 1", "peek": "function"}}
        exec(compile(prelude_source(), "<setup>", "exec", dont_inherit=True), self.names)

    def run(self, expression: str) -> Any:
        return eval(expression, self.names)

    @property
    def final(self) -> dict[str, Any]:
        final: dict[str, Any] = self.names["rlm_final"]
        return final


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_inspection(guest: Guest) -> None:
    assert guest.run("peek()") == TEXT[:2000]
    assert guest.run("peek(3)") == "abc"
    assert guest.run("peek(-1)") == ""
    assert guest.run("tail()") == TEXT[-2000:]
    assert guest.run("tail(4)") == TEXT[-4:]
    assert guest.run("tail(0)") == ""
    assert guest.run("tail(10**9)") == TEXT
    assert guest.run("lenP()") == 5000


def test_show_vars_leaves_out_what_is_not_the_models(guest: Guest) -> None:
    assert guest.run("SHOW_VARS()") == {"x": "int: 1"}


def test_answers_are_counted(guest: Guest) -> None:
    assert guest.final["count"] == 0
    guest.run("FINAL('same')")
    guest.run("FINAL('same')")
    assert guest.final == {"count": 2, "name": "rlm_answer"}
    assert guest.run("rlm_answer") == "same"


@pytest.mark.parametrize(
    ("call", "name", "text"),
    [
        ("FINAL([1, 'x'])", "rlm_answer", "[1, 'x']"),
        ("FINAL(3.5)", "rlm_answer", "3.5"),
        ("FINAL_VAR('x')", "x", ""),
        ("FINAL_VAR(' x ')", "x", ""),
        ("FINAL_VAR('The answer is x.')", "rlm_answer", "The answer is x."),
        ("FINAL_VAR(42)", "rlm_answer", "42"),
    ],
)
def test_answers(guest: Guest, call: str, name: str, text: str) -> None:
    guest.run(call)
    assert guest.final["name"] == name
    assert guest.run("rlm_answer") == text


def test_none_is_no_answer(guest: Guest) -> None:
    with pytest.raises(ValueError, match="no answer"):
        guest.run("FINAL(None)")
    assert guest.final["count"] == 0


def test_a_forged_count_does_not_break_it(guest: Guest) -> None:
    guest.names["rlm_final"]["count"] = "many"
    guest.run("FINAL('a')")
    assert guest.final == {"count": 1, "name": "rlm_answer"}


def test_stays_in_the_small_subset() -> None:
    refused = (
        ast.Import,
        ast.ImportFrom,
        ast.ClassDef,
        ast.Delete,
        ast.Yield,
        ast.YieldFrom,
        ast.GeneratorExp,
        ast.Match,
    )
    assert not [node for node in ast.walk(ast.parse(prelude_source())) if isinstance(node, refused)]


def test_runs_on_the_small_interpreter() -> None:
    monty = pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")

    class Text:
        def slice(self, start: int, end: int) -> str:
            return TEXT[start:end]

        def len_chars(self) -> int:
            return len(TEXT)

    with monty.Monty(max_processes=1) as pool, pool.checkout() as session:
        session.feed_run(prelude_source())
        session.feed_run("pass", inputs={"ctx": monty.ClassInstance(Text(), allowed_methods={"slice", "len_chars"})})

        def run(code: str) -> Any:
            return session.feed_run(code, external_lookup={"session_names": lambda: {"x": "int: 1", "tail": "function"}})

        assert run("[peek(3), tail(4), lenP(), SHOW_VARS()]") == ["abc", TEXT[-4:], 5000, {"x": "int: 1"}]
        assert run("FINAL([1])\nFINAL_VAR('x')\nrlm_final") == {"count": 2, "name": "x"}
        assert run("FINAL_VAR('two words')\n[rlm_final, rlm_answer]") == [{"count": 3, "name": "rlm_answer"}, "two words"]
