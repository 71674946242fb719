"""Budgets: what can be said, and how they are taken."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest

from rlm_sandbox import Policy, PolicyExceeded, TokenUsage
from rlm_sandbox.orchestrator.ledger import LEAST_REPLY_TOKENS, Ledger
from rlm_sandbox.orchestrator.llm import Message, estimate_tokens

CONVERSATION: list[Message] = [{"role": "user", "content": "x" * 300}]


def test_defaults() -> None:
    policy = Policy()
    assert (policy.max_steps, policy.max_subcalls, policy.max_total_tokens, policy.max_seconds) == (40, 200, None, None)
    assert policy.max_concurrent_subcalls == 32
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.max_steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("max_steps", 0, ValueError), ("max_steps", None, TypeError), ("max_steps", 1.5, TypeError), ("max_steps", True, TypeError),
        ("max_subcalls", -1, ValueError), ("max_subcalls", "9", TypeError), ("max_total_tokens", 0, ValueError),
        ("max_seconds", 0, ValueError), ("max_seconds", float("nan"), ValueError), ("max_seconds", float("inf"), ValueError),
        ("max_seconds", "1", TypeError), ("max_concurrent_subcalls", 0, ValueError), ("max_output_tokens", 0, ValueError),
        ("max_feedback_chars", 1, ValueError), ("max_empty_replies", 0, ValueError), ("subcall_models", "m", TypeError),
        ("subcall_models", ("",), TypeError),
    ],
)  # fmt: skip
def test_refused_values_name_the_field(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"Policy\.{field}"):
        Policy(**{field: value})


def test_unlimited_is_spelled_none() -> None:
    policy = Policy(max_subcalls=None, max_total_tokens=None, max_seconds=None)
    reserved = Ledger(policy).reserve_subcalls(["x"] * 1000, None)
    assert {item.max_tokens for item in reserved} == {None}


def test_subcalls_are_taken_all_or_none() -> None:
    ledger = Ledger(Policy(max_subcalls=5))
    ledger.reserve_subcalls(["a"] * 3, None)
    with pytest.raises(PolicyExceeded, match="3 sub-calls asked for, 2 of 5 left"):
        ledger.reserve_subcalls(["a"] * 3, None)
    reserved = ledger.reserve_subcalls(["a"] * 2, None)
    ledger.release(reserved[0])
    ledger.reserve_subcalls(["a"], None)
    with pytest.raises(PolicyExceeded, match="0 of 5 left"):
        ledger.reserve_subcalls(["a"], None)


def test_parallel_callers_cannot_overrun_together() -> None:
    ledger = Ledger(Policy(max_subcalls=100, max_total_tokens=100_000))
    got: list[int] = []

    def take() -> None:
        try:
            while True:
                got.extend(item.tokens for item in ledger.reserve_subcalls(["hello"], 500))
        except PolicyExceeded:
            pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 100
    assert sum(got) <= 100_000


def test_tokens_are_promised_then_settled() -> None:
    ledger = Ledger(Policy(max_total_tokens=1_000))
    first = ledger.reserve_subcalls(["x" * 300], 400)[0]
    assert first.max_tokens == 400
    second = ledger.reserve_subcalls(["x" * 300], None)[0]
    assert second.max_tokens == 1_000 - 400 - 2 * estimate_tokens("x" * 300)
    with pytest.raises(PolicyExceeded, match="0 of 1000 left"):
        ledger.reserve_subcalls(["x"], 10)
    ledger.settle(second, TokenUsage(100, 50))
    ledger.settle(first, TokenUsage(100, 50))
    assert ledger.tokens.total_tokens == 300
    assert ledger.reserve_subcalls(["x" * 300], 400)[0].max_tokens == 400


def test_a_short_reply_may_use_the_last_tokens() -> None:
    ledger = Ledger(Policy(max_total_tokens=40))
    assert ledger.reserve_subcalls(["x" * 3], None)[0].max_tokens == 40 - 2
    ledger = Ledger(Policy(max_total_tokens=LEAST_REPLY_TOKENS))
    with pytest.raises(PolicyExceeded):
        ledger.reserve_subcalls(["x" * 3], None)
    assert ledger.reserve_subcalls(["x" * 3], 4)[0].max_tokens == 4


def test_the_root_reply_gets_what_is_left() -> None:
    ledger = Ledger(Policy(max_total_tokens=1_000))
    assert ledger.reserve_reply(CONVERSATION).max_tokens == 1_000 - estimate_tokens("x" * 300)
    assert Ledger(Policy(max_output_tokens=50)).reserve_reply(CONVERSATION).max_tokens == 50
    with pytest.raises(PolicyExceeded):
        Ledger(Policy(max_total_tokens=100)).reserve_reply(CONVERSATION)


def test_caps_of_subcalls() -> None:
    ledger = Ledger(Policy(max_subcall_output_tokens=100))
    assert [ledger.reserve_subcalls(["x"], asked)[0].max_tokens for asked in (None, 50, 500)] == [100, 50, 100]


def test_time() -> None:
    assert Ledger(Policy()).seconds_left is None
    ledger = Ledger(Policy(max_seconds=0.000_001))
    with pytest.raises(PolicyExceeded, match="time"):
        ledger.reserve_subcalls(["x"], None)
    assert ledger.seconds_left == 0
