"""What the root model reads."""

from __future__ import annotations

import dataclasses

import pytest

from rlm_sandbox import Context, ExecResult, Feature, LimitHit, Limits, Policy
from rlm_sandbox.limits import PER_CELL, PER_SESSION
from rlm_sandbox.orchestrator.feedback import clip, describe_cell, first_message, system_prompt
from rlm_sandbox.testing import FakeREPL

LIMITS = Limits()


def describe(result: ExecResult, max_chars: int = 10_000) -> str:
    return describe_cell(result, 3, LIMITS, max_chars)


def test_plain_results() -> None:
    assert describe(ExecResult(outcome="ok")) == "[cell 3] ok\n(no output)"
    assert describe(ExecResult(outcome="ok", stdout="a\n", value="4")) == "[cell 3] ok\nstdout:\na\nvalue: 4"
    assert "stderr:\nwarning" in describe(ExecResult(outcome="ok", stderr="warning\n"))


def test_an_error_keeps_its_output_and_traceback() -> None:
    result = ExecResult(
        outcome="error", stdout="before\n", error="ValueError: no", traceback='Traceback:\n  File "<cell 3>"\nValueError: no\n'
    )
    said = describe(result)
    assert said.index("before") < said.index('File "<cell 3>"')
    assert said.endswith("ValueError: no")
    assert "Variables assigned before it are kept" in said


def test_an_error_without_traceback() -> None:
    assert describe(ExecResult(outcome="error", error="SyntaxError: bad")).endswith("error:\nSyntaxError: bad")


@pytest.mark.parametrize("kind", [name for name in (*PER_CELL, *PER_SESSION) if name not in ("session_seconds", "network")])
def test_each_limit_has_words_of_its_own(kind: str) -> None:
    said = describe(ExecResult(outcome="limit", limit=LimitHit(kind, 7, None, "host"), state="restored"))
    assert "7" in said
    assert "at a limit (" not in said  # the words for a kind nobody knows
    assert "as they were before this cell" in said


def test_what_is_left_of_the_state() -> None:
    def stopped(**fields: object) -> str:
        return describe(dataclasses.replace(ExecResult(outcome="crashed"), **fields))  # type: ignore[arg-type]

    assert "as the cell left them" in stopped(state="kept")
    assert "nothing that it assigned is there" in stopped(state="restored")
    assert "variables are gone (a, b)" in stopped(state="lost", lost_names=("a", "b"))
    assert "gone; ctx" in stopped(state="lost")


def test_unknown_limit_and_no_limit() -> None:
    assert "(fuel: 5)" in describe(ExecResult(outcome="limit", limit=LimitHit("fuel", 5, None, "host")))
    assert "at a limit" in describe(ExecResult(outcome="limit"))


@pytest.mark.parametrize("outcome", ["interrupted", "crashed", "violation"])
def test_other_ends(outcome: str) -> None:
    assert describe(ExecResult(outcome=outcome)).startswith("[cell 3] ")  # type: ignore[arg-type]


def test_everything_is_bounded() -> None:
    flood = "x" * 200_000
    result = ExecResult(
        outcome="error", stdout=flood, stderr=flood, value=flood, error=flood, traceback=flood, dropped_bytes=9,
        lost_names=tuple(flood for _ in range(100)), state="lost",
    )  # fmt: skip
    for max_chars in (200, 1_000, 10_000):
        assert len(describe(result, max_chars)) < max_chars + 1_500
    assert "(9 bytes of output were over the limit" in describe(result)
    assert "characters not shown" in describe(result)
    crashed = dataclasses.replace(result, outcome="crashed")
    assert len(describe(crashed, 1_000)) < 4_000


def test_output_keeps_head_and_tail() -> None:
    said = describe(ExecResult(outcome="ok", stdout="H" * 5_000 + "T" * 5_000), 1_000)
    assert "HHHH" in said
    assert said.endswith("TTTT")


def test_clip() -> None:
    assert clip("abc", 3) == "abc"
    assert clip("a" * 50 + "b" * 50, 30) == "a" * 20 + "\n[... 70 characters not shown ...]\n" + "b" * 10


def test_system_prompt_says_what_holds() -> None:
    repl = FakeREPL()
    policy = Policy(max_steps=7, max_subcalls=9, max_total_tokens=1234, max_seconds=55)
    said = system_prompt(repl.capabilities, Limits(time_seconds=3, memory_mb=99), policy)
    for words in (
        "7 replies",
        "Sub-calls: 9",
        "Tokens: 1234",
        "Time: 55 s",
        "compute for 3 s",
        "Memory: 99 MB",
        "FINAL_VAR",
        "```repl",
    ):
        assert words in said
    assert "Language:" not in said
    assert "fake" not in said


def test_system_prompt_of_a_small_language() -> None:
    small = dataclasses.replace(
        FakeREPL().capabilities, language=frozenset({Feature.CLASSES, Feature.CLOSURES}), notes=("len(ctx) {does} not work",)
    )
    said = system_prompt(small, Limits(time_seconds=None, memory_mb=None), Policy(max_subcalls=None))
    assert "no yield" in said
    assert "no del statement" in said
    assert "class statements do not work" not in said
    assert "- len(ctx) {does} not work" in said
    assert "None s" not in said
    assert "Memory: " not in said


def test_first_message() -> None:
    assert first_message("Why?", Context.from_text("abc")) == "The text has 3 characters in one document.\n\nQuestion: Why?"
