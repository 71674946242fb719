"""Models that fail in every way, behind the real SDK: a run ends in time, says why, and keeps the steps it has made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlm_sandbox import RLM, AdapterError, JsonlWriter, Limits, OpenAIAdapter, Policy, available
from rlm_sandbox.orchestrator import Listener, RunFinished, SubcallFinished, Trace
from rlm_sandbox.testing import FakeREPL

from ..conftest import require_usable
from .faulty_server import (
    Behaviour,
    FaultyServer,
    closes,
    completion,
    dribbles,
    fails,
    half_a_body,
    http,
    says,
    sends,
    silent,
    times,
)

KEY = "sk-secret-0123456789"
CELL = "Let me compute.\n```repl\nx = 40 + 2\nprint('seen')\nx\n```"
FINAL = "FINAL: 42"
OK = ("ok", "seen\n")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OPENAI_API_KEY",
        "LLM_API_KEY",
        "OPENAI_BASE_URL",
        "LLM_BASE_URL",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    # The SDK's own first wait, where a server names none: half a second.
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def _adapter(server: FaultyServer, **options: Any) -> OpenAIAdapter:
    return OpenAIAdapter("m", base_url=server.url, api_key=KEY, **{"timeout": 5.0, "max_retries": 2, **options})


def _run(server: FaultyServer, *listeners: Listener, policy: Policy | None = None, **options: Any) -> tuple[str, Trace]:
    rlm = RLM(_adapter(server, **options), repl_factory=FakeREPL, listeners=listeners, policy=policy)
    return rlm.run("q", "hay")


RETRIED = {
    "429": (fails("429 Too Many Requests"), "status 429"),
    "500": (fails("500 Internal Server Error"), "status 500"),
    "503": (fails("503 Service Unavailable"), "status 503"),
    "half a body": (half_a_body, "broken connection"),
    "nothing": (closes, "broken connection"),
    "no http": (lambda peer: peer.sendall(b"\x16\x03\x01\x02\x00 what is this\r\n\r\n"), "broken connection"),
}


@pytest.mark.parametrize(("fault", "noted"), RETRIED.values(), ids=RETRIED)
def test_what_passes_is_retried_by_the_sdk_and_in_the_trace(fault: Behaviour, noted: str) -> None:
    with FaultyServer(says(CELL), fault, fault, says(FINAL)) as server:
        answer, trace = _run(server)
    assert (answer, trace.verified) == ("42", True)
    assert [reply.retries for reply in trace.replies] == [(), (noted, noted)]
    assert trace.replies[1].to_json()["retries"] == [noted, noted]
    assert [request["retry"] for request in server.requests] == [0, 0, 1, 2]


FATAL: dict[str, tuple[Behaviour, str, str]] = {
    "429": (fails("429 Too Many Requests"), "rate_limit", "limits the rate or the quota is used up after 2 retries (status 429); wait"),
    "500": (fails("500 Internal Server Error"), "server", "failed with status 500 after 2 retries (status 500); try again later"),
    "half a body": (half_a_body, "connection", "broke before the answer was whole after 2 retries (broken connection); try"),
    "nothing": (closes, "connection", "broke before the answer was whole after 2 retries"),
    "half of the JSON": (sends(completion("x")[:40]), "response", "check the base URL"),
    "garbage": (sends(bytes(range(256)) * 4), "response", "check the base URL"),
    "a page": (sends(b"<html>log in</html>", Content_Type="text/html"), "response", "without a choice"),
    "an empty body": (sends(b""), "response", "check the base URL"),
    "deep": (sends(b"[" * 200_000), "response", "check the base URL"),
    "deep and whole": (sends(b'{"choices":' + b"[" * 5_000 + b"]" * 5_000 + b"}"), "response", ""),
    "a huge number": (sends(b'{"choices":' + b"9" * 10_000 + b"}"), "response", "check the base URL"),
    "no choices": (sends(b'{"choices": []}'), "response", "without a choice"),
    "a refusal": (says(None, refusal="I can't\x1b[31m."), "response", "the model refused: I can't"),
    "an error in disguise": (sends(b'{"error": {"message": "overloaded"}}'), "response", "without a choice"),
    "another encoding": (sends(b"\x1f\x8b broken", Content_Encoding="gzip"), "connection", "after 2 retries"),
    "401": (fails("401 Unauthorized"), "auth", "refused the API key; check"),
    "a redirect to itself": (sends(b"", status="307 Temporary Redirect", Location="/v1/chat/completions"), "connection", ""),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "kind", "words"), FATAL.values(), ids=FATAL)
def test_what_does_not_pass_ends_the_run_and_keeps_its_steps(fault: Behaviour, kind: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with JsonlWriter(path) as writer, FaultyServer(says(CELL), fault) as server, pytest.raises(AdapterError) as caught:
        _run(server, writer)
    error = caught.value
    said = str(error)
    assert error.kind == kind
    assert words in said
    assert said.isprintable()
    assert KEY not in said
    trace = error.trace
    assert trace is not None
    assert [(cell.outcome, cell.stdout) for cell in trace.cells] == [OK]
    assert (trace.stop_reason, trace.answer, trace.verified) == ("adapter_error", "42", False)
    assert trace.finished is not None
    assert trace.finished.error == said
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [item["event"] for item in written] == [event.kind for event in trace]
    assert KEY not in path.read_text()


STUCK: dict[str, Behaviour] = {
    "silent": silent,
    "a byte now and then": dribbles(http(completion("x"), length=1_000_000)),
    "a byte of a header now and then": dribbles(b"HTTP/1.1 200 OK\r\nX-Slow: aaaaaaaa"),
    "429 for ever": fails("429 Too Many Requests"),
    "429 and an hour": fails("429 Too Many Requests", Retry_After="100"),
}


@pytest.mark.parametrize("fault", STUCK.values(), ids=STUCK)
def test_the_runs_time_ends_a_call_and_its_retries(fault: Behaviour) -> None:
    with FaultyServer(says(CELL), fault) as server:
        started = time.monotonic()
        answer, trace = _run(server, policy=Policy(max_seconds=2), max_retries=100, timeout=100.0)
        took = time.monotonic() - started
        assert took < 30  # and not the 100 s of the adapter
        assert (answer, trace.stop_reason, trace.verified) == ("42", "max_seconds", False)
        assert [cell.outcome for cell in trace.cells] == ["ok"]
        assert trace.finished is not None
        assert "did not answer in the" in (trace.finished.error or "")
        time.sleep(0.2)  # what was on its way when the run ended has arrived
        asked = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) == asked, "retries went on after the end of the run"


@pytest.mark.parametrize("name", ["silent", "a byte now and then", "a byte of a header now and then"])
def test_an_attempt_as_a_whole_has_a_time_limit(name: str) -> None:
    with FaultyServer(says(CELL), STUCK[name]) as server, pytest.raises(AdapterError) as caught:
        _run(server, timeout=0.2, max_retries=1)
    assert caught.value.kind == "timeout"
    assert "did not answer within 0.2 s after 1 retry (timeout); try again" in str(caught.value)


def test_a_slow_answer_is_an_answer() -> None:
    def slow(peer: Any) -> None:
        body = http(completion(FINAL))
        for at in range(0, len(body), 40):
            peer.sendall(body[at : at + 40])
            time.sleep(0.01)

    with FaultyServer(slow) as server:
        assert _run(server)[0] == "42"


CUT = {
    "in the code": ("```repl\nx = 1\nprint('a", 1),
    "in a string that is closed nowhere": ('```repl\ns = """' + "a" * 100, 1),
    "in the fence": ("``", 0),
    "in the tag": ("Now.\n```re", 0),
    "after the fence's opening": ("```repl", 0),
    "in the thinking": ("<think>I should write ```repl\nx = 1\n``` and then", 0),
    "between two": ("```repl\nx = 1\n```\n```repl\ny = ", 2),
    "with zeros": ("```repl\nprint('a\x00b')\n```", 1),
    "with half a character": ("```repl\nprint('\ud83d')\n```", 1),
    "with carriage returns": ("```repl\r\nx = 1\r\nx\r\n```\r\n", 1),
    "with nothing": ("", 0),
    "with fences only": ("```\n" * 20_001, 0),
}


@pytest.mark.parametrize("finish_reason", ["length", "stop"])
@pytest.mark.parametrize(("text", "cells"), CUT.values(), ids=CUT)
@pytest.mark.parametrize("where", ["fake", "jail"])
def test_replies_that_are_cut_or_odd_do_not_end_the_run(where: str, text: str, cells: int, finish_reason: str) -> None:
    if where == "jail":
        require_usable("jail", available()["jail"])
    with FaultyServer(says(CELL), says(text, finish_reason=finish_reason), says(FINAL)) as server:
        rlm = RLM(_adapter(server), repl_backend="jail", repl_factory=FakeREPL if where == "fake" else None)
        answer, trace = rlm.run("q", "hay")
    assert (answer, trace.verified) == ("42", True)
    assert len(trace.cells) == 1 + cells
    last = server.requests[-1]["messages"][-1]["content"]
    assert ("cut at the output limit" in last) == (finish_reason == "length")


def _by_prompt(faults: dict[str, Behaviour], *root: str) -> Any:
    replies = iter(root)

    def behave(prompt: str) -> Behaviour:
        return faults.get(prompt) or (says(f"about {prompt}") if prompt.startswith("sub") else says(next(replies)))

    return behave


@pytest.mark.parametrize("name", [name for name in FATAL if name != "401"])
def test_a_sub_call_that_fails_fails_alone(name: str) -> None:
    code = """```repl
found = llm_batch(["sub 1", "bad", "sub 2"])
try:
    llm_query("bad")
except Exception as exc:
    said = str(exc)
FINAL(found[0] + "|" + found[1] + "|" + found[2] + "|" + said)
```"""
    with FaultyServer(by_prompt=_by_prompt({"bad": FATAL[name][0]}, code)) as server:
        answer, trace = _run(server)
    first, failed, third, said = answer.split("|")
    assert (first, third) == ("about sub 1", "about sub 2")
    assert failed.startswith("Error: sub-call failed: ")
    assert "sub-call failed: " in said
    assert "127.0.0.1" not in answer
    assert [call.ok for call in sorted(trace.subcalls, key=lambda call: call.subcall)].count(False) == 2


def test_the_retries_of_sub_calls_are_in_the_trace() -> None:
    failures = iter([*times(fails("429 Too Many Requests"), 2), says("at last")])
    with FaultyServer(
        by_prompt=lambda prompt: next(failures) if prompt == "sub" else says("```repl\nFINAL(llm_query('sub'))\n```")
    ) as server:
        answer, trace = _run(server)
    assert answer == "at last"
    assert [call.retries for call in trace.of(SubcallFinished)] == [("status 429", "status 429")]


@pytest.mark.parametrize("fault", STUCK.values(), ids=STUCK)
def test_sub_calls_end_with_their_cell(fault: Behaviour) -> None:
    """The session need not help: `FakeREPL` waits for a host function as long as it takes."""
    code = "```repl\ntry:\n    llm_query('bad')\nexcept Exception as exc:\n    print(exc)\n```"
    with FaultyServer(by_prompt=_by_prompt({"bad": fault}, code, FINAL)) as server:
        rlm = RLM(_adapter(server, timeout=100.0, max_retries=100), repl_factory=FakeREPL, limits=Limits(wall_seconds=0.3))
        started = time.monotonic()
        answer, trace = rlm.run("q", "hay")
        assert time.monotonic() - started < 30  # and not the 100 s of the adapter
        assert answer == "42"
        assert [call.error for call in trace.subcalls] == ["the model did not answer in time"]
        time.sleep(0.2)  # what was on its way when the cell ended has arrived
        asked = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) == asked, "retries went on after the end of the cell"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "content", "message", "usage"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_bodies = st.fixed_dictionaries(
    {},
    optional={
        "choices": _json
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={"message": _json | st.fixed_dictionaries({"content": _json, "refusal": _json}), "finish_reason": _json},
            ),
            max_size=2,
        ),
        "usage": _json | st.fixed_dictionaries({"prompt_tokens": _json, "completion_tokens": _json}),
        "error": _json,
        "object": _json,
    },
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[FaultyServer, list[bytes], OpenAIAdapter]]:
    bodies: list[bytes] = [b""]
    with FaultyServer(lambda peer: peer.sendall(http(bodies[0]))) as server:
        yield server, bodies, _adapter(server, max_retries=0)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(body=_bodies | _json)
def test_any_json_is_a_reply_or_an_adapter_error(fuzzed: tuple[FaultyServer, list[bytes], OpenAIAdapter], body: Any) -> None:
    _, bodies, adapter = fuzzed
    bodies[0] = json.dumps(body).encode()
    reply = failure = None
    try:
        reply = adapter.complete([{"role": "user", "content": "q"}])
    except AdapterError as exc:
        failure = exc
    if reply is None:
        assert failure is not None
        assert failure.kind == "response"
        assert str(failure).isprintable()
        return
    assert isinstance(reply.text, str)
    assert reply.usage.input_tokens >= 0
    assert reply.usage.output_tokens >= 0
    assert reply.finish_reason is None or isinstance(reply.finish_reason, str)


_INTERRUPTED = """
    import sys
    from rlm_sandbox import RLM, Limits, JsonlWriter, OpenAIAdapter, Policy
    from rlm_sandbox.testing import FakeREPL
    url, path, backend, seconds = sys.argv[1:]
    where = {"repl_factory": FakeREPL} if backend == "fake" else {"repl_backend": backend}
    with JsonlWriter(path) as writer:
        rlm = RLM(
            OpenAIAdapter("m", base_url=url, api_key="k", max_retries=100), listeners=[writer],
            policy=Policy(max_seconds=float(seconds) or None), limits=Limits(time_seconds=50), **where,
        )
        try:
            rlm.run("q", "hay")
        except KeyboardInterrupt:
            sys.exit(77)
"""
_BUSY = "```repl\nprint('seen', flush=True)\nwhile True:\n    pass\n```"
_OBSTINATE = (
    "```repl\nprint('seen', flush=True)\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass\n```"
)
_ASKING = "```repl\nprint('seen', flush=True)\nllm_query('bad')\n```"
INTERRUPTED: dict[str, tuple[str, tuple[str, ...], Behaviour, str]] = {
    "while the model thinks": ("fake", (CELL,), silent, "0"),
    "while the model thinks, with a time budget": ("fake", (CELL,), silent, "60"),
    "while the SDK waits to retry": ("fake", (CELL,), fails("429 Too Many Requests", Retry_After="50"), "0"),
    "in a cell": ("jail", (CELL, _BUSY), silent, "0"),
    "in a cell that does not listen": ("jail", (CELL, _OBSTINATE), silent, "0"),
    "in a sub-call": ("jail", (CELL, _ASKING), silent, "0"),
    "in a sub-call in this process": ("fake", (CELL, _ASKING), silent, "0"),
}


@pytest.mark.parametrize(("where", "replies", "fault", "seconds"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_ctrl_c_ends_a_run_with_its_trajectory_complete(
    where: str, replies: tuple[str, ...], fault: Behaviour, seconds: str, tmp_path: Path
) -> None:
    if where == "jail":
        require_usable("jail", available()["jail"])
    path = tmp_path / "run.jsonl"
    in_a_cell = len(replies) == 2
    with FaultyServer(*map(says, replies), fault) as server:
        command = [sys.executable, "-c", textwrap.dedent(_INTERRUPTED), server.url, str(path), where, seconds]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            until = time.monotonic() + 60
            asked = 2 if where == "jail" and "llm_query" not in replies[-1] else len(replies) + 1
            while len(server.requests) < asked or not path.exists() or path.read_text().count("cell_started") < len(replies):
                assert time.monotonic() < until, "the run did not come to the point where it is interrupted"
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            time.sleep(0.1)
            started = time.monotonic()
            os.kill(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
            took = time.monotonic() - started
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 77, stderr
    assert stderr == ""
    assert took < 40  # and not the 50 s that each of them would take
    events = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    end = events[-1]
    assert (end["event"], end["stop_reason"], end["verified"], end["answer"]) == ("run_finished", "interrupted", False, "42")
    assert kinds.count("run_finished") == 1
    assert kinds.count("cell_started") == kinds.count("cell_finished") == len(replies)
    assert kinds.count("subcall_started") == kinds.count("subcall_finished") == ("llm_query" in replies[-1])
    cells = [event for event in events if event["event"] == "cell_finished"]
    assert (cells[0]["outcome"], cells[0]["stdout"]) == OK
    if in_a_cell:
        assert (cells[1]["outcome"], cells[1]["stdout"]) == ("interrupted", "seen\n")


def test_a_listener_has_the_end_of_a_run_that_failed() -> None:
    events: list[Any] = []
    with FaultyServer(fails("400 Bad Request")) as server, pytest.raises(AdapterError):
        RLM(_adapter(server), repl_factory=FakeREPL, listeners=[events.append]).run("q", "hay")
    assert isinstance(events[-1], RunFinished)
