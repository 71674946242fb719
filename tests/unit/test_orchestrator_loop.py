"""The loop, with a scripted model and a session that has no isolation."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlm_sandbox import (
    RLM,
    AdapterError,
    BackendUnavailable,
    Completion,
    Context,
    ExecResult,
    FakeAdapter,
    GuestCrashed,
    JsonlWriter,
    LimitExceeded,
    LimitHit,
    Limits,
    Policy,
    SessionClosed,
    Trace,
)
from rlm_sandbox.orchestrator import AnswerRejected, CellOutput, CellStarted, Event, ModelReplied, RunFinished, RunStarted
from rlm_sandbox.testing import FakeREPL

FENCE = "`" * 3


def cell(code: str) -> str:
    return f"Let me see.\n{FENCE}repl\n{code}\n{FENCE}"


class Scenario:
    """One run: its script, its session, what it said."""

    def __init__(self, *script: Any, text: str = "a needle in a haystack", factory: Any = FakeREPL, **options: Any) -> None:
        self.adapter = FakeAdapter(script)
        self.events: list[Event] = []
        self.sessions: list[FakeREPL] = []
        self.text = text

        def open_one(*, limits: Limits, setup: str) -> FakeREPL:
            self.sessions.append(factory(limits=limits, setup=setup))
            return self.sessions[-1]

        self.rlm = RLM(self.adapter, repl_factory=open_one, listeners=[self.events.append], **options)

    def run(self) -> tuple[str, Trace]:
        return self.rlm.run("What is there?", self.text)

    @property
    def feedback(self) -> str:
        """What the model was last told."""
        return self.adapter.call_log[-1].prompt

    @property
    def end(self) -> RunFinished:
        assert isinstance(self.events[-1], RunFinished)
        return self.events[-1]


def test_from_question_to_answer() -> None:
    scenario = Scenario(
        cell("hits = ctx.find('needle')\nprint(lenP(), peek(3))\nhits"),
        cell("answer = llm_query('where: ' + P)\nmany = llm_batch(['1', '2'])"),
        "FINAL_VAR: answer",
        subcall_adapter=FakeAdapter(["in the haystack", "x", "y"], model="small"),
    )
    answer, trace = scenario.run()
    assert answer == "in the haystack"
    assert (trace.verified, trace.stop_reason, trace.steps, len(trace.cells), len(trace.subcalls)) == (True, "final", 3, 2, 3)
    told = [call.prompt for call in scenario.adapter.call_log]
    assert "What is there?" in told[0]
    assert "22 characters" in told[0]
    assert "22 a n" in told[1]
    assert "value: [(2, 8, 'needle')]" in told[1]
    started = trace.started
    assert started is not None
    assert (started.backend, started.subcall_model, started.context_chars) == ("fake", "small", 22)
    assert started.system_prompt == scenario.adapter.call_log[0].messages[0]["content"]
    assert isinstance(scenario.events[0], RunStarted)
    assert trace.total_tokens > 0
    with pytest.raises(SessionClosed):
        scenario.sessions[0].names()


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("FINAL: 42", "42"),
        (cell("FINAL('from code')"), "from code"),
        (cell("FINAL([1, 2])"), "[1, 2]"),
        (cell("x = {'a': 1}\nFINAL_VAR('x')"), "{'a': 1}"),
        (cell("x = 'Paris'\nFINAL_VAR(x + ' it is')"), "Paris it is"),
        (cell("x = 'value'") + "\nFINAL_VAR: x", "value"),
        (cell("x = 'value'") + "\nFINAL(x)", "value"),
        (cell("x = 'value'") + "\nFINAL: x", "value"),
        (cell("x = 'value'") + "\nFINAL: y", "y"),
        (cell("x = 'value'\nFINAL_VAR: x"), "value"),
        (cell("FINAL('first')") + "\nFINAL: second", "first"),
        (cell("FINAL('first')\n1/0"), "first"),
        (cell("FINAL('first')\nexit()"), "first"),
        (cell("class A: pass\nx = A()") + "\nFINAL: x", "x"),
        ("FINAL: P", "P"),
    ],
)
def test_ways_to_answer(reply: str, answer: str) -> None:
    found, trace = Scenario(reply).run()
    assert found == answer
    assert trace.verified


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("FINAL_VAR: nope", "no variable named nope"),
        (cell("FINAL_VAR('nope')"), "no variable named nope"),
        ("FINAL_VAR: x['a']", "not the name of a variable"),
        ("FINAL_VAR: ctx", "belongs to the REPL"),
        ("FINAL:", "it is empty"),
        (cell("x = None") + "\nFINAL_VAR: x", "is empty"),
        (cell("x = object()") + "\nFINAL_VAR: x", "FINAL(str(x))"),
        ("FINAL_VAR: None", "cannot be the name of a variable"),
        ("FINAL_VAR: class", "cannot be the name of a variable"),
        (cell("FINAL_VAR('__builtins__')"), "cannot be the name of a variable"),
        (f"FINAL_VAR: {'x' * 1000}", "cannot be the name of a variable"),
        (cell("x = 10**5000") + "\nFINAL_VAR: x", "too many digits"),
        (cell("x = [10**5000]\nFINAL_VAR('x')"), "too many digits"),
    ],
)
def test_an_answer_that_cannot_be_taken_goes_back(reply: str, words: str) -> None:
    scenario = Scenario(reply, "FINAL: ok")
    answer, trace = scenario.run()
    assert answer == "ok"
    assert words in scenario.feedback
    assert words in trace.of(AnswerRejected)[0].reason


def test_code_goes_before_the_final_of_the_same_reply() -> None:
    scenario = Scenario(cell("x = 1/0") + "\nFINAL: made up", "FINAL: honest")
    answer, _ = scenario.run()
    assert answer == "honest"
    assert "ZeroDivisionError" in scenario.feedback
    assert "FINAL after the code of your reply was not taken" in scenario.feedback


def test_several_cells_of_a_reply_run_until_one_fails() -> None:
    scenario = Scenario("\n".join([cell("a = 1"), cell("b = a / 0"), cell("c = 3")]), "FINAL: done")
    scenario.run()
    assert scenario.sessions[0].cells == ["a = 1", "b = a / 0"]
    assert "The 1 later code blocks of your reply were not run" in scenario.feedback


def test_an_old_final_is_never_taken_again() -> None:
    scenario = Scenario(cell("FINAL_VAR('nope')"), cell("x = 1"), cell("1/0"), "FINAL: ok")
    answer, trace = scenario.run()
    assert answer == "ok"
    assert len(trace.of(AnswerRejected)) == 1


class Killing(FakeREPL):
    """Reports a cell that says ``kill STATE`` as one that was stopped at its time limit."""

    def exec(self, code: str, **options: Any) -> ExecResult:
        before = dict(self._globals.get("rlm_final", {}))
        result = super().exec(code, **options)
        state = code.partition("# kill ")[2].strip()
        if not state:
            return result
        if state == "lost":
            self.reset()
        elif state == "restored":
            self._globals["rlm_final"] = before
        read = result.read if state == "kept" else {}
        hit = LimitHit("time_seconds", 10, 10.2, "host")
        return dataclasses.replace(result, outcome="limit", limit=hit, state=state, read=read, lost_names=("x",))  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["kept", "restored", "lost"])
def test_the_final_of_a_killed_cell_does_not_count(state: str) -> None:
    scenario = Scenario(
        cell("FINAL_VAR('nope')"),
        cell(f"x = 1\nFINAL('too early') # kill {state}"),
        cell("FINAL('right')"),
        factory=Killing,
    )
    answer, trace = scenario.run()
    assert answer == "right"
    told = scenario.adapter.call_log[2].prompt
    assert "computed for more than 10 s" in told
    assert {"kept": "as the cell left them", "restored": "as they were before", "lost": "are gone (x)"}[state] in told
    assert ("does not count" in told) == (state == "kept")
    assert trace.cells[1].state == state


def test_a_guest_may_leave_anything_under_the_answers_name() -> None:
    forged = ["None", "7", "{'count': 'x'}", "{'count': 9}", "{'count': 10, 'name': 2}", "[]", "{'count': 11, 'name': 'x.y'}"]
    scenario = Scenario(*[cell(f"rlm_final = {value}") for value in forged], "FINAL: ok")
    assert scenario.run()[0] == "ok"


def test_an_answer_that_cannot_cross_is_told_and_costs_nothing_more() -> None:
    class Narrow(FakeREPL):
        def get(self, name: str, default: Any = None) -> Any:
            value = super().get(name, default)
            if isinstance(value, str) and len(value) > 1_000:
                raise LimitExceeded("value_bytes", 1_000)
            return value

    scenario = Scenario(cell("FINAL('x' * 10_000)"), cell("print('next')"), "FINAL: short", factory=Narrow)
    answer, trace = scenario.run()
    assert answer == "short"
    assert "the answer cannot be read (LimitExceeded)" in trace.of(AnswerRejected)[0].reason
    assert trace.cells[1].stdout == "next\n"


def test_reading_an_answer_may_cost_the_guest_its_state() -> None:
    class Fragile(FakeREPL):
        def get(self, name: str, default: Any = None) -> Any:
            value = super().get(name, default)
            if value == "deadly":
                self.reset()
                raise GuestCrashed("the guest died", state="lost")
            return value

    answer, trace = Scenario(cell("FINAL('deadly')"), cell("FINAL('fine')"), factory=Fragile).run()
    assert (answer, trace.stop_reason) == ("fine", "final")


def test_steps_end_with_the_best_answer_not_verified() -> None:
    scenario = Scenario(cell("1 + 1"), cell("40 + 2"), "FINAL: about 42", policy=Policy(max_steps=2))
    answer, trace = scenario.run()
    assert (answer, trace.verified, trace.stop_reason, trace.steps) == ("about 42", False, "max_steps", 2)
    assert "no more code is run" in scenario.feedback


@pytest.mark.parametrize(
    ("last", "answer"),
    [
        (["It is probably 42."], "It is probably 42."),
        (["FINAL_VAR: nope"], "42"),
        (["FINAL_VAR: x"], "41"),
        ([cell("more()")], "Let me see."),
        ([AdapterError("timeout", "late")], "42"),
        ([], "42"),
    ],
)
def test_best_answer_when_the_last_chance_is_missed(last: list[Any], answer: str) -> None:
    found, trace = Scenario(cell("x = 41\n42"), *last, policy=Policy(max_steps=1)).run()
    assert found == answer
    assert (trace.verified, trace.stop_reason) == (False, "max_steps")


def test_replies_without_code_or_answer() -> None:
    scenario = Scenario("Hm.", "I think it is 42.", "So: 42", "FINAL: 42", policy=Policy(max_empty_replies=3))
    answer, trace = scenario.run()
    assert (answer, trace.verified, trace.stop_reason) == ("42", False, "max_empty_replies")
    assert "neither code" in scenario.adapter.call_log[1].prompt
    scenario = Scenario("Hm.", cell("1"), "Hm.", cell("1"), "Hm.", "FINAL: ok", policy=Policy(max_empty_replies=2))
    assert scenario.run()[1].verified


def test_a_reply_cut_at_the_output_limit_is_told() -> None:
    scenario = Scenario(Completion(f"{FENCE}repl\nx = 1\ny = (", finish_reason="length"), "FINAL: ok")
    scenario.run()
    assert "SyntaxError" in scenario.feedback
    assert "cut at the output limit" in scenario.feedback


def test_an_answer_cut_at_the_output_limit_is_not_taken() -> None:
    cut = Completion("FINAL: the first of many wor", finish_reason="length")
    scenario = Scenario(cut, "FINAL: short")
    answer, trace = scenario.run()
    assert (answer, len(trace.of(AnswerRejected))) == ("short", 1)
    assert "was cut at the output limit" in scenario.feedback
    answer, trace = Scenario(cut, policy=Policy(max_steps=1)).run()
    assert (answer, trace.verified) == ("the first of many wor", False)
    named = Completion(cell("x = 'all of it'") + "\nFINAL_VAR: x\nwhich is", finish_reason="length")
    assert Scenario(named).run()[1].verified


def test_subcall_budget_holds_inside_a_cell() -> None:
    code = "n = 0\ntry:\n    while True:\n        llm_query('x')\n        n += 1\nexcept Exception as e:\n    print(n, type(e).__name__, e)"
    scenario = Scenario(cell(code), "FINAL: ok", policy=Policy(max_subcalls=7), subcall_adapter=FakeAdapter(["y"] * 100))
    answer, trace = scenario.run()
    assert answer == "ok"
    assert "7 PolicyExceeded 1 sub-calls asked for, 0 of 7 left" in scenario.feedback
    assert len(trace.subcalls) == 7


def test_token_budget_ends_the_run() -> None:
    scenario = Scenario(*[cell("print('x' * 3000)")] * 50, policy=Policy(max_total_tokens=6_000))
    answer, trace = scenario.run()
    assert (trace.verified, trace.stop_reason) == (False, "max_total_tokens")
    assert trace.total_tokens <= 6_000
    assert answer.startswith("xxx")
    assert all(call.max_tokens for call in scenario.adapter.call_log)


def test_run_time_ends_a_cell_that_waits_for_sub_calls() -> None:
    def slow(prompt: str) -> str:
        time.sleep(0.02)
        return "y"

    slow_model = FakeAdapter()
    slow_model.add_rule("", slow)
    code = "while True:\n    try:\n        llm_query('x')\n    except Exception:\n        pass"
    scenario = Scenario(
        cell(code), "FINAL: never asked", policy=Policy(max_seconds=0.15, max_subcalls=None), subcall_adapter=slow_model
    )
    _, trace = scenario.run()
    assert (trace.stop_reason, trace.verified) == ("max_seconds", False)
    limit = trace.cells[0].limit
    assert limit is not None
    assert limit.kind == "wall_seconds"
    assert limit.limit < 0.16
    assert len(trace.cells) == 1
    assert len(scenario.adapter.call_log) == 1


def test_a_sub_call_that_outlives_its_cell_is_abandoned() -> None:
    def stuck(prompt: str) -> str:
        release.wait(60)
        return "late"

    release = threading.Event()
    model = FakeAdapter()
    model.add_rule("", stuck)
    code = "import threading, time\nthreading.Thread(target=llm_query, args=('x',), daemon=True).start()\ntime.sleep(0.05)"
    scenario = Scenario(cell(code), "FINAL: ok", subcall_adapter=model)
    _, trace = scenario.run()
    release.set()
    kinds = [event.kind for event in trace]
    assert kinds[kinds.index("subcall_started") :][:3] == ["subcall_started", "subcall_finished", "cell_finished"]
    assert trace.subcalls[0].error == "abandoned: the cell ended first"
    assert kinds[-1] == "run_finished"


def test_run_time_ends_a_model_call() -> None:
    def stuck(prompt: str) -> str:
        release.wait(60)
        return "FINAL: too late"

    release = threading.Event()
    scenario = Scenario(stuck, policy=Policy(max_seconds=0.05))
    answer, trace = scenario.run()
    release.set()
    assert (answer, trace.stop_reason, trace.steps) == ("", "max_seconds", 0)


def test_model_errors_are_raised_with_a_complete_trajectory() -> None:
    scenario = Scenario(cell("40 + 2"), AdapterError("auth", "the key was refused; get another"))
    with pytest.raises(AdapterError, match="get another"):
        scenario.run()
    assert (scenario.end.stop_reason, scenario.end.error, scenario.end.answer) == (
        "adapter_error",
        "the key was refused; get another",
        "42",
    )
    assert scenario.sessions[0]._closed


def test_model_errors_cross_the_deadline_thread() -> None:
    with pytest.raises(AdapterError, match="refused"):
        Scenario(AdapterError("auth", "refused"), policy=Policy(max_seconds=60)).run()


def test_an_adapter_of_the_wrong_shape() -> None:
    class Odd:
        model = "odd"

        def complete(self, messages: Any, **_: Any) -> Any:
            return "text"

    with pytest.raises(AdapterError, match="returned a str and not a Completion"):
        RLM(Odd(), repl_factory=FakeREPL).run("q", "t")


def test_a_session_that_ends_gives_the_best_answer() -> None:
    class Ending(FakeREPL):
        def exec(self, code: str, **options: Any) -> ExecResult:
            if "second" in code:
                raise SessionClosed("the session reached its 3600 s; open a new one")
            return super().exec(code, **options)

    answer, trace = Scenario(cell("'first'"), cell("'second'"), factory=Ending).run()
    assert (answer, trace.verified, trace.stop_reason) == ("'first'", False, "session_closed")
    assert trace.finished is not None
    assert "3600" in (trace.finished.error or "")


def test_a_session_that_cannot_be_opened() -> None:
    def none(**_: Any) -> Any:
        raise BackendUnavailable("jail", "no user namespaces", "enable them")

    events: list[Event] = []
    with pytest.raises(BackendUnavailable, match="enable them"):
        RLM(FakeAdapter(["x"]), repl_factory=none, listeners=[events.append]).run("q", "t")
    assert events == []


def test_an_unknown_backend_is_refused_by_the_registry() -> None:
    with pytest.raises(ValueError, match="unknown backend 'nope'"):
        RLM(FakeAdapter(["x"]), repl_backend="nope").run("q", "t")


def test_live_output_is_passed_on_and_bounded() -> None:
    scenario = Scenario(cell("for i in range(100): print('x' * 99)"), "FINAL: ok", limits=Limits(output_bytes=1_000))
    scenario.run()
    live = [event for event in scenario.events if isinstance(event, CellOutput)]
    assert sum(len(event.text) for event in live) == 1_000
    kinds = [type(event) for event in scenario.events]
    assert kinds.index(ModelReplied) < kinds.index(CellStarted) < kinds.index(CellOutput)


def test_a_listener_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    def broken(event: Event) -> None:
        raise OSError("disk full")

    path = tmp_path / "out.jsonl"
    with JsonlWriter(path) as writer:
        rlm = RLM(FakeAdapter([cell("1"), "FINAL: ok"]), repl_factory=FakeREPL, listeners=[broken, writer])
        answer, trace = rlm.run("q", "t")
    assert answer == "ok"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [{key: value for key, value in line.items() if key != "schema"} for line in lines] == trace.to_json()


def test_runs_are_independent() -> None:
    scenario = Scenario(cell("x = 1"), "FINAL_VAR: x", "FINAL_VAR: x", "FINAL: none")
    assert scenario.run()[0] == "1"
    answer, trace = scenario.run()
    assert answer == "none"
    assert trace.steps == 2
    assert len(scenario.sessions) == 2


def test_own_system_prompt_and_temperature() -> None:
    scenario = Scenario("FINAL: ok", system_prompt="Be brief.", temperature=0.25)
    scenario.run()
    call = scenario.adapter.call_log[0]
    assert call.messages[0]["content"] == "Be brief."
    assert call.temperature == 0.25


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RLM("model"), TypeError, "complete"),  # type: ignore[arg-type]
        (lambda: RLM(FakeAdapter(), limits={}), TypeError, "limits must be a Limits"),  # type: ignore[arg-type]
        (lambda: RLM(FakeAdapter(), policy={"max_steps": 1}), TypeError, "policy must be a Policy"),  # type: ignore[arg-type]
        (lambda: RLM(FakeAdapter(), listeners=["x"]), TypeError, "not callable"),  # type: ignore[list-item]
        (lambda: RLM(FakeAdapter()).run("", "text"), ValueError, "query is empty"),
        (lambda: RLM(FakeAdapter()).run(1, "text"), TypeError, "query must be a str"),  # type: ignore[arg-type]
        (lambda: RLM(FakeAdapter()).run("q", ["text"]), TypeError, "from_documents"),  # type: ignore[arg-type]
    ],
)
def test_mistakes(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_context_object_is_used_as_it_is() -> None:
    scenario = Scenario(cell("print(ctx.metadata()['source'])"), "FINAL: ok")
    scenario.rlm.run("q", Context.from_text("abc", metadata={"source": "here"}))
    assert "here" in scenario.feedback
