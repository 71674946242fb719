"""The command line against a stub of an OpenAI-compatible endpoint; cells run in `FakeREPL`."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rlm_sandbox.cli as cli
from rlm_sandbox import BackendUnavailable
from rlm_sandbox.adapters import FakeAdapter, OpenAIAdapter
from rlm_sandbox.orchestrator import loop
from rlm_sandbox.testing import FakeREPL

REPLIES = ["Let me see.\n```repl\nn = len(ctx.find('needle'))\nprint('found', n)\n```", "FINAL_VAR: n"]


class _Stub(BaseHTTPRequestHandler):
    replies: list[str]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer good-key":
            self._answer(401, {"error": {"message": "bad key"}})
        elif request["model"] != "stub-model":
            self._answer(404, {"error": {"message": "no such model"}})
        else:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.replies.pop(0)}}
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            self._answer(
                200,
                {"id": "1", "object": "chat.completion", "created": 1, "model": "stub-model", "choices": [choice], "usage": usage},
            )

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    handler = type("Handler", (_Stub,), {"replies": list(REPLIES)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLM_API_KEY", "LLM_BASE_URL", "OPENAI_BASE_URL", "LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "good-key")
    monkeypatch.setattr(loop, "open_repl", lambda name, *, limits, setup, **_: FakeREPL(limits=limits, setup=setup))
    # Retries wait, and there is nothing to wait for.
    monkeypatch.setattr(cli, "OpenAIAdapter", functools.partial(OpenAIAdapter, max_retries=0))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("hay needle hay needle hay", encoding="utf-8")
    return path


Result = tuple[int, str, str]


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, ["run", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def _one_sentence(result: Result, *words: str, status: int = 1) -> None:
    code, stdout, stderr = result
    assert code == status
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("rlm-sandbox: ")
    assert "Traceback" not in stdout
    for word in words:
        assert word in lines[0]


def test_a_question_is_answered(endpoint: str, text: Path) -> None:
    code, stdout, stderr = _run("How many?", text, "--base-url", endpoint, "--model", "stub-model")
    assert (code, stderr) == (0, "")
    assert "found 2\n" in stdout
    assert "answer: 2\n" in stdout


def test_json_is_all_there_is_on_stdout(endpoint: str, text: Path, tmp_path: Path) -> None:
    trace = tmp_path / "run.jsonl"
    code, stdout, stderr = _run("How many?", text, "--base-url", endpoint, "--model", "stub-model", "--json", "--trace", trace)
    assert code == 0
    report = json.loads(stdout)
    assert report["usage"].pop("seconds") >= 0
    assert report == {
        "answer": "2", "verified": True, "stop_reason": "final", "error": None, "backend": "fake", "model": "stub-model",
        "usage": {"steps": 2, "cells": 1, "subcalls": 0, "input_tokens": 200, "output_tokens": 20}, "trace": str(trace),
    }  # fmt: skip
    assert "found 2\n" in stderr
    assert f"trajectory: {trace}" in stderr
    events = [json.loads(line)["event"] for line in trace.read_text().splitlines()]
    assert events[0] == "run_started"
    assert events[-1] == "run_finished"


def test_a_budget_that_runs_out_has_its_own_status(endpoint: str, text: Path) -> None:
    code, stdout, _ = _run("How many?", text, "--base-url", endpoint, "--model", "stub-model", "--max-steps", 1)
    assert code == 3
    assert "best answer so far, not verified: 2\n" in stdout


def test_the_endpoint_refuses(endpoint: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one_sentence(_run("Why?", text, "--base-url", endpoint, "--model", "absent"), "no model 'absent'", "check the model")
    monkeypatch.setenv("OPENAI_API_KEY", "bad-key")
    result = _run("Why?", text, "--base-url", endpoint, "--model", "stub-model")
    _one_sentence(result, "refused the API key", "check OPENAI_API_KEY")
    assert "bad-key" not in result[1] + result[2]


def test_nobody_listens(text: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    _one_sentence(_run("Why?", text, "--base-url", f"http://127.0.0.1:{port}/v1"), "cannot connect", "check the base URL")


def test_a_missing_key(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    _one_sentence(_run("Why?", text), "no API key", "set OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "nope"), "unknown backend 'nope'; choose from auto, docker, jail"),
        (("--time-seconds", "-1"), "--time-seconds must be above 0"),
        (("--time-seconds", "nan"), "--time-seconds must be above 0"),
        (("--memory-mb", "3"), "--memory-mb must be between 16 and"),
        (("--max-steps", "0"), "--max-steps must be between 1 and"),
        (("--max-seconds", "0"), "--max-seconds must be above 0"),
        (("--max-total-tokens", "0"), "--max-total-tokens must be between"),
        (("--encoding", "utf-17"), "unknown encoding 'utf-17'"),
        (("--base-url", "localhost"), "is not an http or https address"),
        (("--trace", "/nowhere/at/all.jsonl"), "cannot write the trace '/nowhere/at/all.jsonl': No such file or directory; choose"),
        (("--trace", "/"), "Is a directory; choose another --trace path"),
        (("--model", " "), "needs the name of a model"),
    ],
)
def test_wrong_options(text: Path, options: tuple[str, ...], words: str) -> None:
    result = _run("Why?", text, *options)
    _one_sentence(result, words)
    assert "write None" not in result[2]


def _absent(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_absent, "No such file or directory; check the path"),
        (Path.mkdir, "is a directory; name the files in it"),
        (Path.touch, "is empty"),
        (lambda path: path.write_bytes(b"\x7fELF\x02\x01\x00\x00"), "is a binary file"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n"), "is not utf-8 text"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    path = tmp_path / "given\x1b[31m"
    make(path)
    result = _run("Why?", path)
    _one_sentence(result, words)
    assert "\x1b" not in result[2]


def test_the_trace_does_not_overwrite_an_input(text: Path) -> None:
    _one_sentence(_run("Why?", text, "--trace", text.parent / "." / "text.txt"), "would overwrite the input file")
    assert text.read_text().startswith("hay")


def test_an_empty_question(text: Path) -> None:
    _one_sentence(_run(" ", text), "question is empty")


def test_a_backend_that_is_missing_here(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise BackendUnavailable("jail", "no user namespaces", "ask your administrator")

    monkeypatch.setattr(loop, "open_repl", missing)
    _one_sentence(_run("Why?", text, "--backend", "jail"), "no user namespaces; ask your administrator")


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c(text: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(cli, "OpenAIAdapter", lambda model, **_: FakeAdapter([KeyboardInterrupt()], model=model))
    code, stdout, stderr = _run("Why?", text, *(["--json"] if as_json else []))
    assert code == 130
    assert stderr.endswith("rlm-sandbox: interrupted\n")
    assert not as_json or json.loads(stdout)["stop_reason"] == "interrupted"


def test_the_sub_model(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        "big": FakeAdapter(["```repl\nFINAL(llm_query('x'))\n```"], model="big"),
        "small": FakeAdapter(["from the small one"], model="small"),
    }
    monkeypatch.setattr(cli, "OpenAIAdapter", lambda model, **_: models[model])
    code, stdout, _ = _run("Why?", text, "--model", "big", "--sub-model", "small")
    assert code == 0
    assert "answer: from the small one" in stdout


def test_wrong_usage_is_status_2() -> None:
    assert _run("Why?")[0] == 2
    assert _run("Why?", "x", "--memory-mb", "much")[0] == 2


def test_help_has_examples() -> None:
    code, stdout, _ = _run("--help")
    assert code == 0
    assert "\n    rlm-sandbox run " in stdout


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "rlm_sandbox", "--version"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert done.stdout.startswith("rlm-sandbox 0.")


def test_a_shell_completes_backends() -> None:
    asked = {"_RLM_SANDBOX_COMPLETE": "complete_bash", "COMP_WORDS": "rlm-sandbox run --backend ja", "COMP_CWORD": "3"}
    command = [sys.executable, "-c", "from rlm_sandbox.cli import app; app(prog_name='rlm-sandbox')"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, **asked}, check=False)
    assert done.stdout.split() == ["jail"], done.stderr
