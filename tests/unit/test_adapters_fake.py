"""The scripted model."""

from __future__ import annotations

import re
import threading

import pytest

from rlm_sandbox import AdapterError, Completion, FakeAdapter, LLMAdapter, TokenUsage
from rlm_sandbox.orchestrator import Message


def user(text: str) -> list[Message]:
    return [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]


def test_script_in_order_then_an_error_that_says_what_to_do() -> None:
    adapter: LLMAdapter = FakeAdapter(["one", "two"])
    assert [adapter.complete(user("x")).text for _ in range(2)] == ["one", "two"]
    with pytest.raises(AdapterError, match="script of 2 is at its end; add a reply") as caught:
        adapter.complete(user("x"))
    assert caught.value.kind == "script"


def test_rules_before_script() -> None:
    adapter = FakeAdapter(["scripted"])
    adapter.add_rule("a.c", "literal")
    adapter.add_rule(r"^\d+$", "digits", regex=True)
    adapter.add_rule("once", "first", once=True)
    adapter.add_rule("call", lambda prompt: prompt.upper())
    said = [adapter.complete(user(text)).text for text in ("xa.cx", "abc 12", "12", "once", "call me")]
    assert said[:3] == ["literal", "scripted", "digits"]
    assert said[3:] == ["first", "CALL ME"]
    with pytest.raises(AdapterError):
        adapter.complete(user("once"))


def test_rules_look_at_the_last_user_message_only() -> None:
    adapter = FakeAdapter(["scripted"])
    adapter.add_rule("needle", "rule")
    conversation: list[Message] = [
        *user("needle"),
        {"role": "assistant", "content": "needle"},
        {"role": "user", "content": "other"},
    ]
    assert adapter.complete(conversation).text == "scripted"


def test_completions_and_exceptions() -> None:
    adapter = FakeAdapter([Completion("x", TokenUsage(5, 7), "length"), AdapterError("timeout", "late")])
    reply = adapter.complete(user("x"))
    assert (reply.usage.total_tokens, reply.finish_reason) == (12, "length")
    with pytest.raises(AdapterError, match="late"):
        adapter.complete(user("x"))
    assert [call.text for call in adapter.call_log] == ["x", None]


def test_call_log() -> None:
    adapter = FakeAdapter(["a"])
    adapter.complete(user("hello"), model="m", max_tokens=3, temperature=0.5)
    call = adapter.call_log[0]
    assert (call.prompt, call.model, call.max_tokens, call.temperature, call.text) == ("hello", "m", 3, 0.5, "a")
    assert len(call.messages) == 2


def test_from_many_threads() -> None:
    adapter = FakeAdapter([str(number) for number in range(200)])
    threads = [threading.Thread(target=lambda: [adapter.complete(user("x")) for _ in range(20)]) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(call.text or "") for call in adapter.call_log) == list(range(200))


def test_mistakes() -> None:
    with pytest.raises(TypeError, match="one string"):
        FakeAdapter("reply")
    with pytest.raises(re.error):
        FakeAdapter().add_rule("(", "x", regex=True)
