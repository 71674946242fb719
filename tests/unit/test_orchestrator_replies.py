"""Replies taken apart: the habits of real models, and any text at all."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_sandbox.orchestrator.replies import FinalAnswer, parse_reply

FENCE = "`" * 3


def fenced(tag: str, code: str) -> str:
    return f"{FENCE}{tag}\n{code}\n{FENCE}"


def codes(text: str) -> list[str]:
    return [block.code for block in parse_reply(text).blocks]


@pytest.mark.parametrize("tag", ["repl", "python", "py", "python3", "Python", "", " repl ", "{python}", "python title=x"])
def test_code_tags(tag: str) -> None:
    assert codes(f"Let me look.\n{fenced(tag, 'x = 1')}\nThen we see.") == ["x = 1"]


@pytest.mark.parametrize("tag", ["json", "text", "bash", "output", "markdown"])
def test_other_tags_are_prose(tag: str) -> None:
    reply = parse_reply(fenced(tag, "x = 1"))
    assert reply.blocks == ()
    assert reply.prose == "x = 1"


def test_several_fences_in_order() -> None:
    text = f"a\n{fenced('repl', 'x = 1')}\nb\n{fenced('python', 'y = 2')}\nc"
    assert codes(text) == ["x = 1", "y = 2"]
    assert parse_reply(text).prose == "a\nb\nc"


def test_untagged_fence_is_prose_beside_tagged_code() -> None:
    assert codes(f"{fenced('', 'expected output')}\n{fenced('repl', 'x = 1')}") == ["x = 1"]


def test_unclosed_fence_is_code() -> None:
    reply = parse_reply(f"Now:\n{FENCE}repl\nx = 1\ny = 2")
    assert codes(f"Now:\n{FENCE}repl\nx = 1\ny = 2") == ["x = 1\ny = 2"]
    assert not reply.blocks[0].closed


def test_blank_fences_do_not_count() -> None:
    assert codes(f"{fenced('repl', '   ')}\n{fenced('', 'x = 1')}") == ["x = 1"]


def test_fence_details() -> None:
    assert codes("~~~python\nx = 1\n~~~") == ["x = 1"]
    assert codes(f"{FENCE}`repl\ns = '''\n{FENCE}\n'''\n{FENCE}`") == [f"s = '''\n{FENCE}\n'''"]
    assert codes(f"- first\n  {FENCE}py\n  if x:\n      y\n\n  {FENCE}") == ["if x:\n    y\n"]
    assert codes(f"{FENCE}repl\r\nx = 1\r\n{FENCE}\r\n") == ["x = 1"]
    assert codes(f"inline {FENCE}x = 1{FENCE} code") == []
    assert codes(f"{FENCE}x = 1{FENCE}") == []


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("FINAL: 42", "text", "42"),
        ("I know it.\n\nFINAL: 42\n", "text", "42"),
        ("FINAL:\nline one\nline two", "text", "line one\nline two"),
        ("**FINAL:** 42", "text", "42"),
        ("**FINAL: 42**", "text", "42"),
        ("**FINAL**: 42", "text", "42"),
        ("`FINAL: 42`", "text", "42"),
        ("## FINAL: 42", "text", "42"),
        ("> FINAL: 42", "text", "42"),
        ("FINAL ANSWER: 42", "text", "42"),
        ("FINAL: **bold** answer", "text", "**bold** answer"),
        ("FINAL:", "text", ""),
        ("FINAL(42)", "text", "42"),
        ('FINAL("forty-two")', "text", "forty-two"),
        ("FINAL('it\\'s \\n')", "text", "it's \n"),
        ('FINAL("""a\nb""")\nthat is all', "text", "a\nb"),
        ('FINAL("smile :)")', "text", "smile :)"),
        ("FINAL(it's about (roughly) 42)", "text", "it's about (roughly) 42"),
        ("FINAL(unclosed", "text", "unclosed"),
        ("FINAL_VAR: answer", "variable", "answer"),
        ("**FINAL_VAR:** `answer`.", "variable", "answer"),
        ('FINAL_VAR("answer")', "variable", "answer"),
        ("FINAL_VAR('answer')", "variable", "answer"),
        ("FINAL_VAR(answer)", "variable", "answer"),
        ("FINAL_VAR: _x_", "variable", "_x_"),
        ("FINAL_VAR: answer\nIt holds the list.", "variable", "answer"),
        (fenced("", "FINAL: 42"), "text", "42"),
        (fenced("text", "FINAL: 42"), "text", "42"),
        (fenced("repl", "FINAL_VAR: answer"), "variable", "answer"),
        ("<think>FINAL: 1\n</think>\nFINAL: 2", "text", "2"),
    ],
)
def test_final_answers(text: str, kind: str, value: str) -> None:
    reply = parse_reply(text)
    assert reply.final is not None
    assert (reply.final.kind, reply.final.text) == (kind, value)
    assert reply.blocks == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "FINAL",
        "Final: no",
        "The FINAL: is later",
        "FINALLY: done",
        "FINAL_VARIABLE: x",
        "<think>FINAL: 1",
        "I will use FINAL(x)",
    ],
)
def test_no_final_answer(text: str) -> None:
    assert parse_reply(text).final is None


def test_code_and_final_of_one_reply() -> None:
    reply = parse_reply(f"{fenced('repl', 'x = 1')}\nFINAL_VAR: x")
    assert [block.code for block in reply.blocks] == ["x = 1"]
    assert reply.final == FinalAnswer("variable", "x")


def test_final_as_last_line_of_code() -> None:
    reply = parse_reply(fenced("repl", "x = 1\nFINAL_VAR: x"))
    assert [block.code for block in reply.blocks] == ["x = 1"]
    assert reply.final == FinalAnswer("variable", "x")


def test_final_call_in_a_fence_is_code() -> None:
    reply = parse_reply(fenced("repl", "FINAL(x)"))
    assert [block.code for block in reply.blocks] == ["FINAL(x)"]
    assert reply.final is None


def test_text_after_final_keeps_its_fences_but_repl() -> None:
    reply = parse_reply(f"FINAL: use this\n{fenced('python', 'x = 1')}\n{fenced('repl', 'y = 2')}\nthat is it")
    assert [block.code for block in reply.blocks] == ["y = 2"]
    assert reply.final == FinalAnswer("text", f"use this\n{fenced('python', 'x = 1')}\nthat is it")


def test_first_final_counts() -> None:
    assert parse_reply("FINAL_VAR: a\nFINAL_VAR: b").final == FinalAnswer("variable", "a")


PIECES = st.sampled_from(
    [FENCE, FENCE + "repl", FENCE + "python", "~~~", "\n", " ", "FINAL:", "FINAL(", "FINAL_VAR:", ")", '"', "'", '"""', "\\",
     "(", "x = 1", "<think>", "</think>", "**", "`", "> ", "\r\n", "\x00", "\ud800", "é", "\x1b[2J", "FINAL_VAR("]
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=60).map("".join) | st.text(max_size=200))
def test_any_text_is_a_reply(text: str) -> None:
    reply = parse_reply(text)
    assert sum(len(block.code) for block in reply.blocks) + len(reply.prose) <= len(text)
    if reply.final is not None:
        assert len(reply.final.text) <= len(text)


@pytest.mark.parametrize(
    "piece",
    [FENCE + "\n", FENCE + "repl\nx\n", "FINAL(", "FINAL(\n", "FINAL_VAR:\n", "FINAL(\"\n", "(", "`", "*", "\\", "> ", "<think>", '"""', "~~~ x\n"],
)  # fmt: skip
def test_time_grows_with_the_length_only(piece: str) -> None:
    # A quadratic parser takes minutes for a text of this length; this is a ceiling, not a measurement.
    started = time.process_time()
    parse_reply(piece * (400_000 // len(piece)))
    assert time.process_time() - started < 20
