"""What a person sees of a run, and what never reaches the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlm_sandbox import LimitHit, Usage
from rlm_sandbox.console import ConsoleListener, inert, one_line
from rlm_sandbox.orchestrator import (
    AnswerRejected,
    BatchFinished,
    BatchStarted,
    CellFinished,
    CellOutput,
    CellStarted,
    Event,
    ModelReplied,
    RunFinished,
    RunStarted,
    StepStarted,
    SubcallFinished,
    SubcallStarted,
)

#: Sequences that move the cursor, set the title or the clipboard, hide text, reverse it, or end the line.
HOSTILE = "\x1b[2J\x1b]0;title\x07\x1b]52;c;aGk=\x1b\\\x9b31m\r\x08\x00\x7f\u202egnp\u2066\u200b\u2028\ufeff\ud800\x1b[31mred"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text\n\twith a tab", "plain text\n\twith a tab"),
        ("h\u00e9 \u6f22\u5b57 \U0001f600\u3000\u00a0\ue0b0", "h\u00e9 \u6f22\u5b57 \U0001f600\u3000\u00a0\ue0b0"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]0;t\x07", r"\x1b]0;t\x07"),
        ("a\rb\x00\x7f\x9b", r"a\rb\x00\x7f\x9b"),
        ("\u202eevil\u2069", r"\u202eevil\u2069"),
        ("\u200b\ufeff\u2028\U000e0041", r"\u200b\ufeff\u2028\U000e0041"),
        ("\ud800", r"\ud800"),
    ],
)
def test_inert(text: str, expected: str) -> None:
    assert inert(text) == expected


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_inert_leaves_nothing_that_acts(text: str) -> None:
    shown = inert(text)
    assert all(char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in shown)
    shown.encode("utf-8")
    assert inert(shown) == shown


def test_one_line_is_one_short_line() -> None:
    assert one_line("a\n b\tc", 20) == "a b c"
    assert one_line("x" * 100, 20) == "x" * 17 + "..."
    assert one_line(" " * 1000 + "x", 20).endswith("...")
    assert "\x1b" not in one_line(HOSTILE, 200)


def _cell(**changes: Any) -> CellFinished:
    fields: dict[str, Any] = {
        "step": 1, "cell": 1, "outcome": "ok", "stdout": "", "stderr": "", "value": None, "error": None, "traceback": None,
        "limit": None, "state": "kept", "lost_names": (), "dropped_bytes": 0, "usage": Usage(), "protected": True, "seconds": 0.1,
    }  # fmt: skip
    return CellFinished(**(fields | changes))


def _subcall(batch: int | None, index: int = 0, **changes: Any) -> SubcallFinished:
    fields: dict[str, Any] = {
        "step": 1, "cell": 1, "subcall": index + 1, "batch": batch, "index": index, "size": 3, "response": "said", "response_chars": 4,
        "error": None, "input_tokens": 1, "output_tokens": 1, "seconds": 0.5,
    }  # fmt: skip
    return SubcallFinished(**(fields | changes))


def _finished(**changes: Any) -> RunFinished:
    fields: dict[str, Any] = {
        "answer": "42", "verified": True, "stop_reason": "final", "error": None, "steps": 2, "cells": 1, "subcalls": 4,
        "input_tokens": 1000, "output_tokens": 20, "seconds": 3.0,
    }  # fmt: skip
    return RunFinished(**(fields | changes))


def _started(query: str = "Why?") -> RunStarted:
    return RunStarted(
        run_id="r", query=query, context_chars=12_000_000, context_documents=700, model="big", subcall_model="small", backend="jail",
        isolation="a process", system_prompt="", limits={}, policy={},
    )  # fmt: skip


def _show(*events: Event, terminal: bool = False, **options: Any) -> str:
    # legacy_windows and the environment must not decide what a test sees.
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, color_system="truecolor" if terminal else None
    )
    with ConsoleListener(console, **options) as listener:
        for event in events:
            listener(event)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _reply(text: str) -> ModelReplied:
    return ModelReplied(step=1, text=text, input_tokens=10, output_tokens=5, seconds=1.5, finish_reason="stop")


def _output(text: str, stream: Any = "stdout") -> CellOutput:
    return CellOutput(step=1, cell=1, stream=stream, text=text)


def test_retries_are_shown() -> None:
    shown = _show(
        replace(_reply("x"), retries=("status 429", "status 429")),
        _subcall(None, retries=("timeout",)),
        _subcall(None, error="no", retries=("\x1b[31m",)),
        _finished(stop_reason="max_seconds", verified=False, error="the model did not answer in time"),
    )
    assert "model replied in 1.5 s (10 tokens in, 5 out), after 2 retries (status 429)\n" in shown
    assert "llm_query answered in 0.5 s, after 1 retry (timeout): said\n" in shown
    assert "llm_query failed: no, after 1 retry (\\x1b[31m)\n" in shown
    assert "the time budget is used up: the model did not answer in time\n" in shown


def test_a_run_as_plain_lines() -> None:
    shown = _show(
        _started(),
        StepStarted(step=1),
        _reply("First I look.\n```repl\nprint(1)\n```"),
        CellStarted(step=1, cell=1, code="print(1)\nif x:\n    y()\n"),
        _output("par"),
        _output("tial\nopen line"),
        BatchStarted(step=1, cell=1, batch=1, size=3),
        *(_subcall(1, index) for index in range(3)),
        BatchFinished(step=1, cell=1, batch=1, size=3, ok=3, seconds=0.7),
        SubcallStarted(step=1, cell=1, subcall=4, batch=None, index=0, size=1, model="small", prompt="ask", prompt_chars=3),
        _subcall(None),
        _cell(value="'echo'"),
        AnswerRejected(step=1, reason="there is no such variable"),
        _finished(),
    )
    assert shown == (
        "Why?\n"
        "context  12,000,000 characters, 700 documents\n"
        "model    big, sub-calls small\n"
        "backend  jail: a process\n"
        "\n"
        "Step 1\n"
        "model replied in 1.5 s (10 tokens in, 5 out)\n"
        "First I look.\n"
        "cell 1\n"
        "  print(1)\n"
        "  if x:\n"
        "      y()\n"
        "partial\n"
        "open line\n"
        "llm_batch: 3 sub-calls\n"
        "llm_batch: 3 of 3 answered in 0.7 s\n"
        "llm_query answered in 0.5 s: said\n"
        "=> 'echo'\n"
        "cell 1 ok in 0.10 s\n"
        "answer not taken: there is no such variable\n"
        "\n"
        "answer: 42\n"
        "2 steps, 1 cells, 4 sub-calls, 1,000 tokens in, 20 out, 3.0 s\n"
    )


@pytest.mark.parametrize(
    ("cell", "lines"),
    [
        (
            _cell(outcome="limit", limit=LimitHit("time_seconds", 2.0, 2.26, "host"), state="restored"),
            [
                "limit hit: time_seconds of 2, observed 2.26 (measured by the host)",
                "state restored: the variables are as they were",
            ],
        ),
        (
            _cell(outcome="limit", limit=LimitHit("memory_mb", 256, None, "kernel")),
            ["memory_mb of 256 (measured by the kernel)", "kept"],
        ),
        (
            _cell(outcome="error", error="ValueError: x", traceback="Traceback\n  here\nValueError: x"),
            ["Traceback\n  here\nValueError: x"],
        ),
        (
            _cell(outcome="crashed", error="signal 11", state="lost", lost_names=("a", "b")),
            ["crashed: signal 11", "variables (a, b)"],
        ),
        (_cell(outcome="interrupted"), ["interrupted", "state kept"]),
        (_cell(outcome="violation", state="restored"), ["violation", "state restored"]),
        (_cell(dropped_bytes=1234), ["1,234 bytes of output"]),
    ],
)
def test_what_became_of_a_cell(cell: CellFinished, lines: list[str]) -> None:
    shown = _show(cell)
    for line in lines:
        assert line in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_hostile_reaches_the_terminal(terminal: bool) -> None:
    hostile = HOSTILE + "[bold]markup[/bold] :boom:"
    shown = _show(
        _started(hostile),
        StepStarted(step=1),
        _reply(hostile),
        CellStarted(step=1, cell=1, code=hostile),
        *(_output(char) for char in hostile),
        _output(hostile, "stderr"),
        SubcallStarted(step=1, cell=1, subcall=4, batch=None, index=0, size=1, model=hostile, prompt=hostile, prompt_chars=3),
        _subcall(None, response=hostile),
        _subcall(None, error=hostile),
        _cell(outcome="error", value=hostile, error=hostile, traceback=hostile),
        _cell(outcome="crashed", error=hostile, state="lost", lost_names=(hostile,)),
        AnswerRejected(step=1, reason=hostile),
        _finished(answer=hostile, stop_reason="session_closed", error=hostile),
        terminal=terminal,
    )
    # What rich itself writes: colours, cursor moves of its live line. Everything else is the guest's.
    left = re.sub(r"\x1b\[(?:[\d;]*m|\?25[lh]|2K|1A)", "", shown).replace("\r", "")
    assert [char for char in left if char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")] == []
    assert "[bold]markup[/bold] :boom:" in left
    assert ";title" in left
    assert "\x1b[2J" not in shown


def test_only_the_beginning_of_a_flood_is_shown() -> None:
    shown = _show(*(_output("x" * 60 + "\n") for _ in range(10)), _cell(), max_output_chars=100)
    assert shown.count("x") == 99
    assert shown.count("only the first 100 characters") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_only_the_beginning_of_endless_code_is_shown(terminal: bool) -> None:
    code = "x = 1\n" * 100_000
    shown = _show(CellStarted(step=1, cell=1, code=code), terminal=terminal)
    assert "more characters]" in re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\n", " ")
    assert shown.count("x") < 10_000


def test_a_terminal_has_colours_and_a_bar() -> None:
    events = (
        CellStarted(step=1, cell=1, code="for x in y: pass"),
        BatchStarted(step=1, cell=1, batch=1, size=3),
        _subcall(1, 0),
        _output("while the bar\nis "),
        _subcall(1, 1),
        _output("there\n"),
        _subcall(1, 2, error="timeout"),
        BatchFinished(step=1, cell=1, batch=1, size=3, ok=2, seconds=0.7),
        _cell(),
        _finished(),
    )
    shown = _show(*events, terminal=True)
    assert "\x1b[" in shown
    assert re.search(r"0/3|1/3|2/3|3/3", shown)
    plain = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown)
    for line in ("while the bar\n", "is there\n", "sub-call 3 failed: timeout\n", "llm_batch: 2 of 3 answered in 0.7 s\n"):
        assert line in plain
    assert shown.rstrip().count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is back
    assert "\x1b[" not in _show(*events)


def test_a_terminal_that_only_knows_ascii() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=True, width=80, highlight=False)
    with ConsoleListener(console) as listener:
        for event in (
            _started("caf\u00e9?"),
            StepStarted(step=1),
            _reply("\u6f22"),
            CellStarted(step=1, cell=1, code="x = '\u20ac'"),
            BatchStarted(step=1, cell=1, batch=1, size=3),
            BatchFinished(step=1, cell=1, batch=1, size=3, ok=3, seconds=0.7),
            _output("\u20ac\n"),
            _cell(value="\u20ac"),
            _finished(answer="\u20ac"),
        ):
            listener(event)
    console.file.flush()
    assert b"caf\\xe9?" in raw.getvalue()
    assert raw.getvalue().count(b"\\u20ac") == 4


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = _show(
        CellStarted(step=1, cell=1, code="for x in y: pass"), _cell(outcome="error", error="E"), _finished(), terminal=True
    )
    assert not re.search(r"\x1b\[[\d;]*[349]\d", shown)


def test_a_reader_who_leaves_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich would take this process's own standard output away

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    listener = ConsoleListener(Console(file=Gone()))
    listener(_started())
    listener(_finished())


def test_it_is_not_fooled_by_a_cell_that_runs_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    guest = io.StringIO()
    with ConsoleListener() as listener, contextlib.redirect_stdout(guest):
        listener(_output("seen\n"))
    assert guest.getvalue() == ""
    assert capsys.readouterr().out == "seen\n"


@pytest.mark.parametrize(
    ("finished", "lines"),
    [
        (
            _finished(verified=False, stop_reason="max_steps"),
            ["best answer so far, not verified: 42", "the step budget is used up"],
        ),
        (
            _finished(verified=False, answer="", stop_reason="session_closed", error="gone"),
            ["stopped: the session could not go on: gone"],
        ),
    ],
)
def test_a_run_that_was_cut_short_says_so(finished: RunFinished, lines: list[str]) -> None:
    shown = _show(finished)
    for line in lines:
        assert line in shown
