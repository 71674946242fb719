"""An OpenAI-compatible endpoint on loopback that misbehaves as told: one `Behaviour` for each request, in order."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

Behaviour = Callable[[socket.socket], None]
"""Answers one request, or does not."""


def http(body: bytes, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    """A whole response. ``length`` is what it claims to have."""
    lines = [
        f"HTTP/1.1 {status}",
        "Connection: close",
        f"Content-Length: {len(body) if length is None else length}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in {"Content_Type": "application/json", **headers}.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def completion(text: Any, *, finish_reason: str = "stop", **message: Any) -> bytes:
    """The body of a reply."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(body).encode()


def says(text: Any, **options: Any) -> Behaviour:
    """An ordinary reply."""
    return lambda peer: peer.sendall(http(completion(text, **options)))


def sends(body: bytes, **options: Any) -> Behaviour:
    """This body, whatever it is."""
    return lambda peer: peer.sendall(http(body, **options))


def fails(status: str, **headers: str) -> Behaviour:
    """An error status. It asks for a retry in a moment, if for any."""
    body = json.dumps({"error": {"message": "no luck; try\x1b[31m again", "type": "t"}}).encode()
    wanted = {"Retry_After": "0.02", **headers}
    return lambda peer: peer.sendall(http(body, status, None, **wanted))


def closes(peer: socket.socket) -> None:
    """Nothing, and the end."""


def half_a_body(peer: socket.socket) -> None:
    """Less than it announced, and the end."""
    body = completion("never seen")
    peer.sendall(http(body[: len(body) // 2], length=len(body)))


def silent(peer: socket.socket) -> None:
    """Nothing, until the client goes away."""
    with contextlib.suppress(OSError):
        peer.recv(1)


def dribbles(what: bytes, every: float = 0.02) -> Behaviour:
    """One byte of ``what`` now and then, and then the last one for ever."""

    def behave(peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for byte in what:
                peer.sendall(bytes([byte]))
                time.sleep(every)
            while True:
                peer.sendall(what[-1:])
                time.sleep(every)

    return behave


class FaultyServer:
    """Serves until closed. Behaviours are taken in order; the last one stays. ``requests`` has what was asked."""

    def __init__(self, *behaviours: Behaviour, by_prompt: Callable[[str], Behaviour] | None = None) -> None:
        self._behaviours = list(behaviours)
        self._by_prompt = by_prompt
        self._lock = threading.Lock()
        self._peers: list[socket.socket] = []
        self.requests: list[dict[str, Any]] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._peers.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            request = self._read(peer)
            if request is None:
                return
            with self._lock:
                self.requests.append(request)
                behaviour = None if self._by_prompt is None else self._by_prompt(request["messages"][-1]["content"])
                if behaviour is None:
                    behaviour = self._behaviours.pop(0) if len(self._behaviours) > 1 else self._behaviours[0]
            behaviour(peer)

    def _read(self, peer: socket.socket) -> dict[str, Any] | None:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = peer.recv(65_536)
            if not piece:
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        headers = dict(_header(line) for line in head.decode().split("\r\n")[1:])
        while len(body) < int(headers["content-length"]):
            body += peer.recv(65_536)
        request: dict[str, Any] = json.loads(body)
        request["retry"] = int(headers.get("x-stainless-retry-count", "0"))
        return request


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.lower(), value.strip()


def times(behaviour: Behaviour, count: int) -> Iterable[Behaviour]:
    """The same, several times."""
    return [behaviour] * count
