"""The adapter for OpenAI-compatible endpoints, against one on this machine's loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlm_sandbox import AdapterError, OpenAIAdapter
from rlm_sandbox.orchestrator import Message

KEY = "sk-secret-0123456789"
ASK: list[Message] = [{"role": "user", "content": "hello there"}]
STOP = {"index": 0, "finish_reason": "stop"}


class Endpoint:
    """What the server answers next, and what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.body: Any = {}
        self.raw: bytes | None = None
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []

    def says(self, message: Any, **choice: Any) -> None:
        self.body = {"id": "x", "object": "chat.completion", "choices": [{**STOP, "message": message, **choice}]}

    def adapter(self, **options: Any) -> OpenAIAdapter:
        return OpenAIAdapter("m1", base_url=self.url, api_key=KEY, max_retries=0, **options)

    def error(self, **options: Any) -> AdapterError:
        with pytest.raises(AdapterError) as caught:
            self.adapter(**options).complete(ASK)
        said = str(caught.value)
        assert KEY not in said
        assert "\n" not in said
        return caught.value


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.requests.append({"path": self.path, "key": self.headers["Authorization"], **request})
            time.sleep(found.delay)
            content = found.raw if found.raw is not None else json.dumps(found.body).encode()
            try:
                self.send_response(found.status)
                self.send_header("Content-Type", "application/json" if found.raw is None else "text/html")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client has gone away: the timeout test

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_answer(endpoint: Endpoint) -> None:
    endpoint.says({"role": "assistant", "content": "hi"})
    endpoint.body["usage"] = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    reply = endpoint.adapter().complete(ASK, max_tokens=50, temperature=0.2)
    assert (reply.text, reply.usage.input_tokens, reply.usage.output_tokens, reply.finish_reason) == ("hi", 11, 3, "stop")
    assert not reply.usage.estimated
    request = endpoint.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["key"] == f"Bearer {KEY}"
    assert (request["model"], request["messages"], request["max_tokens"], request["temperature"]) == ("m1", ASK, 50, 0.2)


def test_what_is_not_asked_for_is_not_sent(endpoint: Endpoint) -> None:
    endpoint.says({"role": "assistant", "content": "hi"})
    reply = endpoint.adapter().complete(ASK, model="other")
    assert set(endpoint.requests[0]) == {"path", "key", "model", "messages"}
    assert endpoint.requests[0]["model"] == "other"
    assert reply.usage.estimated
    assert reply.usage.total_tokens > 0


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, "request", "status 400: bad *** thing; check"),
        (401, "auth", "refused the API key; check OPENAI_API_KEY"),
        (403, "auth", "does not let this API key use 'm1'"),
        (404, "model", "no model 'm1'"),
        (422, "request", "status 422"),
        (429, "rate_limit", "limits the rate"),
        (500, "server", "status 500; try again later"),
        (503, "server", "status 503"),
    ],
)
def test_refusals(endpoint: Endpoint, status: int, kind: str, words: str) -> None:
    endpoint.status = status
    endpoint.body = {"error": {"message": f"bad {KEY} \x1b thing.\n", "type": "t", "code": "c"}}
    error = endpoint.error()
    assert error.kind == kind
    assert words in str(error)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"choices": []}, "without a choice"),
        ({}, "without a choice"),
        ([], "without a choice"),
        ({"choices": None}, "without a choice"),
        ({"choices": [{**STOP, "message": None}]}, "without text"),
        ({"choices": [{**STOP, "message": {"role": "assistant", "content": None}}]}, "without text"),
        ({"choices": [{**STOP, "message": {"role": "assistant", "content": [1]}}]}, "without text"),
        (
            {"choices": [{**STOP, "message": {"role": "assistant", "content": None, "refusal": "I can't.\x07"}}]},
            "refused: I can't;",
        ),
        ({"choices": [{"index": 0, "finish_reason": "length", "message": {"content": None}}]}, "output limit"),
        ({"choices": [{"index": 0, "finish_reason": "content_filter", "message": {"content": None}}]}, "content filter"),
    ],
)
def test_answers_of_the_wrong_shape(endpoint: Endpoint, body: Any, words: str) -> None:
    endpoint.body = body
    error = endpoint.error()
    assert error.kind == "response"
    assert words in str(error)


@pytest.mark.parametrize("raw", [b"", b"<html>login</html>", b"\xff\xfe"])
def test_answers_that_are_not_json(endpoint: Endpoint, raw: bytes) -> None:
    endpoint.raw = raw
    assert endpoint.error().kind == "response"


def test_timeout(endpoint: Endpoint) -> None:
    endpoint.delay = 0.5
    error = endpoint.error(timeout=0.1)
    assert error.kind == "timeout"
    assert "within 0.1 s" in str(error)


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(AdapterError, match=f"cannot connect to 127.0.0.1:{port}; check the base URL") as caught:
        OpenAIAdapter("m", base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0).complete(ASK)
    assert caught.value.kind == "connection"


def test_missing_key() -> None:
    with pytest.raises(AdapterError, match="set OPENAI_API_KEY or LLM_API_KEY") as caught:
        OpenAIAdapter("m")
    assert caught.value.kind == "auth"


def test_environment(monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("LLM_API_KEY", KEY)
    monkeypatch.setenv("LLM_BASE_URL", endpoint.url)
    endpoint.says({"role": "assistant", "content": "hi"})
    adapter = OpenAIAdapter("m")
    assert adapter.complete(ASK).text == "hi"
    assert endpoint.requests[0]["key"] == f"Bearer {KEY}"
    assert KEY not in repr(adapter)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://", "nonsense", "http://a b/v1", "http://x:port/v1", "http://[::1/v1"]
)
def test_bad_address(url: str) -> None:
    with pytest.raises(AdapterError, match="not an http or https address"):
        OpenAIAdapter("m", base_url=url, api_key=KEY)


@pytest.mark.parametrize("key", ["two words", "„sk-1“", "sk-1\nX: y"])
def test_bad_key(key: str) -> None:
    with pytest.raises(AdapterError, match="copy it again") as caught:
        OpenAIAdapter("m", api_key=key)
    assert key not in str(caught.value)


def test_lone_surrogates_are_sent_as_something(endpoint: Endpoint) -> None:
    endpoint.says({"role": "assistant", "content": "hi"})
    endpoint.adapter().complete([{"role": "user", "content": "a\ud800b"}])
    assert endpoint.requests[0]["messages"][0]["content"] == "a?b"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="name of a model"):
        OpenAIAdapter(" ", api_key=KEY)
    with pytest.raises(ValueError, match="timeout"):
        OpenAIAdapter("m", api_key=KEY, timeout=0)
    with pytest.raises(ValueError, match="max_retries"):
        OpenAIAdapter("m", api_key=KEY, max_retries=-1)


def test_the_sdk_is_imported_only_when_needed() -> None:
    code = "import sys, rlm_sandbox; rlm_sandbox.FakeAdapter(); sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
