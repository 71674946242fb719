"""``llm_query`` and ``llm_batch`` as a cell calls them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from rlm_sandbox import AdapterError, Completion, FakeAdapter, Policy, PolicyExceeded, TokenUsage
from rlm_sandbox.orchestrator import Message
from rlm_sandbox.orchestrator.events import BatchFinished, BatchStarted, Event, EventStream, SubcallFinished, SubcallStarted
from rlm_sandbox.orchestrator.ledger import Ledger
from rlm_sandbox.orchestrator.subcalls import SubcallDesk, SubcallFailed


class Bench:
    """A desk with a cell running, and everything it says."""

    def __init__(self, adapter: Any, **policy: Any) -> None:
        self.events: list[Event] = []
        self.policy = Policy(**policy)
        self.ledger = Ledger(self.policy)
        self.desk = SubcallDesk(adapter, self.policy, self.ledger, EventStream([self.events.append]))
        self.desk.begin_cell(2, 5)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Gate:
    """An adapter that answers when it is let, and knows how many calls it has at once."""

    model = "gate"

    def __init__(self) -> None:
        self.open = threading.Event()
        self.lock = threading.Lock()
        self.calls = 0
        self.now = 0
        self.most = 0

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seconds: float | None = None,
    ) -> Completion:
        with self.lock:
            self.calls += 1
            self.now += 1
            self.most = max(self.most, self.now)
        self.open.wait(60)
        with self.lock:
            self.now -= 1
        return Completion("done", TokenUsage(10, 5))

    def wait_for(self, calls: int) -> None:
        deadline = time.monotonic() + 60
        while self.calls < calls and time.monotonic() < deadline:
            time.sleep(0.001)
        assert self.calls >= calls


def echo() -> FakeAdapter:
    adapter = FakeAdapter(model="echo")
    adapter.add_rule("", lambda prompt: f"<{prompt}>")
    return adapter


def test_llm_query() -> None:
    bench = Bench(echo())
    assert bench.desk.llm_query("hello") == "<hello>"
    started, finished = bench.events
    assert isinstance(started, SubcallStarted)
    assert isinstance(finished, SubcallFinished)
    assert (started.step, started.cell, started.subcall, started.batch, started.model, started.prompt) == (
        2,
        5,
        1,
        None,
        "echo",
        "hello",
    )
    assert (finished.subcall, finished.response, finished.ok, finished.response_chars) == (1, "<hello>", True, 7)
    assert finished.input_tokens + finished.output_tokens == bench.ledger.tokens.total_tokens > 0


def test_llm_batch_in_order_with_events() -> None:
    bench = Bench(echo(), max_concurrent_subcalls=3)
    assert bench.desk.llm_batch([str(number) for number in range(10)]) == [f"<{number}>" for number in range(10)]
    assert bench.of(BatchStarted)[0].size == 10
    assert (bench.of(BatchFinished)[0].ok, bench.of(BatchFinished)[0].size) == (10, 10)
    assert sorted(event.index for event in bench.of(SubcallFinished)) == list(range(10))
    assert {(event.batch, event.size) for event in bench.of(SubcallStarted)} == {(1, 10)}
    assert isinstance(bench.events[0], BatchStarted)
    assert isinstance(bench.events[-1], BatchFinished)
    assert bench.desk.made == 10


def test_empty_batch_is_nothing() -> None:
    bench = Bench(echo())
    assert bench.desk.llm_batch([]) == []
    assert bench.events == []


def test_batch_runs_in_parallel_up_to_the_policy() -> None:
    gate = Gate()
    bench = Bench(gate, max_concurrent_subcalls=4)
    thread = threading.Thread(target=bench.desk.llm_batch, args=(["x"] * 10,))
    thread.start()
    gate.wait_for(4)
    gate.open.set()
    thread.join(5)
    assert gate.most == 4
    assert gate.calls == 10


def test_places_are_shared_by_all_callers() -> None:
    gate = Gate()
    bench = Bench(gate, max_concurrent_subcalls=2)
    threads = [threading.Thread(target=bench.desk.llm_query, args=("x",)) for _ in range(5)]
    for thread in threads:
        thread.start()
    gate.wait_for(2)
    gate.open.set()
    for thread in threads:
        thread.join(5)
    assert gate.most == 2
    assert gate.calls == 5


def test_one_failure_leaves_the_others_their_answers() -> None:
    adapter = echo_with_failure()
    bench = Bench(adapter)
    answers = bench.desk.llm_batch(["a", "bad", "c"])
    assert answers[0] == "<a>"
    assert answers[1].startswith("Error: sub-call failed: the model's rate limit")
    assert answers[2] == "<c>"
    assert bench.of(BatchFinished)[0].ok == 2
    assert [event.index for event in bench.of(SubcallFinished) if not event.ok] == [1]


def echo_with_failure() -> FakeAdapter:
    adapter = FakeAdapter()
    adapter.add_rule("bad", AdapterError("rate_limit", "host-17.internal limits the rate"))
    adapter.add_rule("worse", RuntimeError("token=sk-secret"))
    adapter.add_rule("", lambda prompt: f"<{prompt}>")
    return adapter


def test_all_failed_raises() -> None:
    with pytest.raises(SubcallFailed, match="all 2 sub-calls failed; the first: the model's rate limit"):
        Bench(echo_with_failure()).desk.llm_batch(["bad", "bad"])


@pytest.mark.parametrize("prompt", ["bad", "worse"])
def test_a_guest_reads_our_words_never_the_adapters(prompt: str) -> None:
    bench = Bench(echo_with_failure())
    with pytest.raises(SubcallFailed) as caught:
        bench.desk.llm_query(prompt)
    assert "internal" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert bench.of(SubcallFinished)[0].error in str(caught.value)


def test_budget_message_reaches_the_model() -> None:
    bench = Bench(echo(), max_subcalls=3)
    bench.desk.llm_query("a")
    with pytest.raises(PolicyExceeded, match="3 sub-calls asked for, 2 of 3 left"):
        bench.desk.llm_batch(["a", "b", "c"])
    assert bench.desk.llm_batch(["a", "b"]) == ["<a>", "<b>"]
    with pytest.raises(PolicyExceeded, match="0 of 3 left"):
        bench.desk.llm_query("a")
    assert bench.desk.made == 3


def test_token_budget_holds_under_parallel_calls() -> None:
    gate = Gate()
    bench = Bench(gate, max_total_tokens=200, max_subcall_output_tokens=20)
    results: list[Any] = []

    def ask() -> None:
        try:
            results.append(bench.desk.llm_query("x" * 90))
        except PolicyExceeded as exc:
            results.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    gate.wait_for(3)
    gate.open.set()
    for thread in threads:
        thread.join(5)
    # 31 tokens of prompt and 20 of reply are set aside for each: three fit into 200, and 47 left over buy a shorter fourth.
    assert gate.calls == 4
    assert sum(isinstance(result, PolicyExceeded) for result in results) == 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda desk: desk.llm_query(["a"]), "llm_batch takes a list"),
        (lambda desk: desk.llm_query(None), "not NoneType"),
        (lambda desk: desk.llm_batch("abc"), "list of prompts"),
        (lambda desk: desk.llm_batch([1]), "list of prompts"),
        (lambda desk: desk.llm_query("a", max_tokens=0), "above 0"),
        (lambda desk: desk.llm_query("a", max_tokens=True), "above 0"),
        (lambda desk: desk.llm_query("a", max_tokens="9"), "above 0"),
        (lambda desk: desk.llm_query("a", model="dear"), "choose from: echo, small"),
        (lambda desk: desk.llm_query("a", model=7), "not allowed"),
    ],
)
def test_malformed_calls_say_what_to_do(call: Any, words: str) -> None:
    bench = Bench(echo(), subcall_models=("small",))
    with pytest.raises(SubcallFailed, match=words):
        call(bench.desk)
    assert bench.desk.made == 0


def test_allowed_models_and_caps_are_passed_on() -> None:
    adapter = echo()
    bench = Bench(adapter, subcall_models=("small",), max_subcall_output_tokens=9)
    bench.desk.llm_query("a", model="small", max_tokens=5)
    bench.desk.llm_query("a", model="echo", max_tokens=50)
    assert [(call.model, call.max_tokens) for call in adapter.call_log] == [("small", 5), ("echo", 9)]


def test_no_calls_between_cells() -> None:
    bench = Bench(echo())
    bench.desk.end_cell()
    with pytest.raises(SubcallFailed, match="while a cell runs"):
        bench.desk.llm_query("a")


def test_a_killed_cell_spends_nothing_more() -> None:
    gate = Gate()
    bench = Bench(gate, max_concurrent_subcalls=2, max_subcalls=10)

    def waits_for_a_place() -> None:
        with pytest.raises(SubcallFailed, match="not made"):
            bench.desk.llm_query("x")

    thread = threading.Thread(target=waits_for_a_place)
    batch = threading.Thread(target=bench.desk.llm_batch, args=(["x"] * 9,))
    batch.start()
    gate.wait_for(2)
    thread.start()
    bench.desk.end_cell()
    abandoned = bench.of(SubcallFinished)
    assert [event.error for event in abandoned] == ["abandoned: the cell ended first"] * 2
    gate.open.set()
    batch.join(5)
    thread.join(5)
    assert gate.calls == 2  # the other eight were never made
    assert bench.of(SubcallFinished) == abandoned  # and the late answers are not reported again
    assert bench.of(BatchFinished) == []
    assert bench.ledger.tokens.total_tokens == 30  # but what they cost is counted
    bench.desk.begin_cell(3, 6)
    assert bench.desk.llm_batch(["x"] * 8) == ["done"] * 8  # what was not made was given back


def test_adapter_that_returns_something_else() -> None:
    class Odd:
        model = "odd"

        def complete(self, messages: Any, **_: Any) -> Any:
            return {"text": "hi"}

    with pytest.raises(SubcallFailed, match="the call failed"):
        Bench(Odd()).desk.llm_query("a")


def test_long_prompts_are_excerpts_in_events() -> None:
    bench = Bench(echo())
    bench.desk.llm_query("p" * 100_000)
    assert bench.of(SubcallStarted)[0].prompt_chars == 100_000
    assert len(bench.of(SubcallStarted)[0].prompt) < 3_000
    assert len(bench.of(SubcallFinished)[0].response) < 3_000
