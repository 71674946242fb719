"""The multiplexer without a container: two ends on a socket pair, and a peer that breaks the framing."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rlm_sandbox.runners import control
from rlm_sandbox.runners.multiplex import (
    ACK,
    BYTES,
    DATA,
    FILE,
    HEADER,
    MESSAGE,
    STDERR,
    STDOUT,
    VITALS,
    WINDOW,
    Multiplexer,
    StreamFailed,
)

PATIENCE = 30.0


class SocketStream:
    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.read_fd = self.write_fd = sock.fileno()

    def read(self) -> bytes:
        data = self.sock.recv(1 << 16)
        if not data:
            raise StreamFailed("end")
        return data

    def write(self, data: memoryview) -> int:
        return self.sock.send(data)


class End(Multiplexer):
    """One end with the session's side of its descriptors."""

    def __init__(self, sock: socket.socket, *, reads_outputs: bool) -> None:
        self.data, data_theirs = socket.socketpair()
        self.control, control_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pipes: dict[int, int] = {}
        ends = {}
        for channel in (STDOUT, STDERR):
            read, write = os.pipe()
            ends[channel], self.pipes[channel] = (read, write) if reads_outputs else (write, read)
        for fd in self.pipes.values():
            os.set_blocking(fd, False)
        self.data.settimeout(PATIENCE)
        self.control.settimeout(PATIENCE)
        self.ends = ends
        self.theirs = control_theirs
        self.failed: BaseException | None = None
        self.seen: list[Any] = []
        super().__init__(SocketStream(sock), data_theirs, control_theirs, ends, reads_outputs=reads_outputs)
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        try:
            self.run()
        except (StreamFailed, OSError) as exc:
            self.failed = exc

    def on_remote(self, message: control.Message) -> None:
        if message["op"] == "turn":
            self.set_turn(message["turn"])
            self.send_message({"op": "turned"})
        else:
            control.send(self.theirs, message)

    def on_local(self, message: control.Message, fds: list[int]) -> None:
        if message["op"] == "turn":
            self.set_turn(message["turn"])
        for fd in fds:
            self.set_generation(socket.socket(fileno=fd), message["generation"])
        self.send_message(message)

    def vitals(self) -> tuple[float, int] | None:
        return (1.5, 2048) if self._reads_outputs else None

    def on_vitals(self, cpu_seconds: float, headroom_kb: int) -> None:
        self.seen.append((cpu_seconds, headroom_kb))

    def free(self) -> None:
        self.control.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        for sock in (self.data, self._data, self.theirs):
            sock.close()
        for fd in (*self.pipes.values(), *self.ends.values()):
            os.close(fd)


@pytest.fixture
def pair() -> Iterator[tuple[End, End]]:
    """Host and relay."""
    one, two = socket.socketpair()
    host, relay = End(one, reads_outputs=False), End(two, reads_outputs=True)
    host.thread.start()
    relay.thread.start()
    yield host, relay
    host.free()
    one.close()
    relay.free()
    two.close()


def read_all(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(1 << 16)
        assert piece
        data += piece
    return data


def test_bytes_messages_and_output_arrive(pair: tuple[End, End]) -> None:
    host, relay = pair
    host.data.sendall(b"request")
    assert read_all(relay.data, 7) == b"request"
    os.write(relay.pipes[STDERR], b"printed")
    relay.data.sendall(b"answer")
    assert read_all(host.data, 6) == b"answer"
    assert os.read(host.pipes[STDERR], 100) == b"printed"  # it was there before the answer
    assert host.seen == [(1.5, 2048)]
    control.send(host.control, {"op": "order"})
    assert control.receive(relay.control) == ({"op": "order"}, [])
    control.send(relay.control, {"op": "report"})
    assert control.receive(host.control) == ({"op": "report"}, [])


def test_more_than_every_buffer_goes_both_ways_at_once(pair: tuple[End, End]) -> None:
    size = 8 * WINDOW
    threads = [threading.Thread(target=end.data.sendall, args=(bytes(size),)) for end in pair]
    threads += [threading.Thread(target=read_all, args=(end.data, size)) for end in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def _send_until_refused(sock: socket.socket) -> int:
    sent = 0
    sock.settimeout(0.3)
    try:
        while True:
            sent += sock.send(bytes(1 << 16))
    except TimeoutError:
        return sent


def test_an_unread_channel_holds_up_no_other_and_is_bounded(pair: tuple[End, End]) -> None:
    host, relay = pair
    assert _send_until_refused(relay.data) < 4 * WINDOW
    control.send(relay.control, {"op": "report"})
    assert control.receive(host.control) == ({"op": "report"}, [])


def test_unread_output_holds_up_no_message(pair: tuple[End, End]) -> None:
    host, relay = pair
    written = 0
    for _ in range(200):
        try:
            written += os.write(relay.pipes[STDOUT], bytes(1 << 16))
        except BlockingIOError:
            threading.Event().wait(0.002)
    assert written < 6 * WINDOW
    control.send(relay.control, {"op": "report"})
    assert control.receive(host.control) == ({"op": "report"}, [])


def test_output_of_an_older_turn_is_dropped(pair: tuple[End, End]) -> None:
    host, relay = pair
    control.send(host.control, {"op": "turn", "turn": 1})
    control.receive(host.control)
    os.write(relay.pipes[STDOUT], b"one")
    relay.data.sendall(b".")
    read_all(host.data, 1)
    assert os.read(host.pipes[STDOUT], 100) == b"one"
    os.write(relay.pipes[STDOUT], b"between turns")
    control.send(host.control, {"op": "turn", "turn": 2})
    control.receive(host.control)
    os.write(relay.pipes[STDOUT], b"two")
    relay.data.sendall(b".")
    read_all(host.data, 1)
    assert os.read(host.pipes[STDOUT], 100) in (b"two", b"between turnstwo")  # what had arrived before the turn began counts


def test_bytes_of_a_dead_generation_reach_nobody(pair: tuple[End, End]) -> None:
    host, relay = pair
    relay.data.sendall(b"half a fra")
    mine, theirs = socket.socketpair()
    control.send(host.control, {"op": "recover", "generation": 2}, (theirs.fileno(),))
    theirs.close()
    mine.settimeout(PATIENCE)
    assert control.receive(relay.control) == ({"op": "recover", "generation": 2}, [])
    fresh, fresh_theirs = socket.socketpair()
    # As the relay does on such an order; here by a message of its own session, which its end understands alike.
    control.send(relay.control, {"op": "renewed", "generation": 2}, (fresh_theirs.fileno(),))
    fresh_theirs.close()
    fresh.sendall(b"whole")
    assert read_all(mine, 5) == b"whole"
    mine.close()
    fresh.close()


_BREACHES = {
    "unknown kind": HEADER.pack(9, 0, 0, 4) + b"1234",
    "unknown channel": HEADER.pack(BYTES, 7, 0, 1) + b"x",
    "long frame": HEADER.pack(BYTES, DATA, 1, 1 << 30),
    "long message": HEADER.pack(MESSAGE, 0, 0, 1 << 20),
    "empty message": HEADER.pack(MESSAGE, 0, 0, 0),
    "no JSON": HEADER.pack(MESSAGE, 0, 0, 3) + b"[1,",
    "no op": HEADER.pack(MESSAGE, 0, 0, 2) + b"{}",
    "short vitals": HEADER.pack(VITALS, 0, 0, 3) + b"123",
    "a file for the host": HEADER.pack(FILE, DATA, 1, 1) + b"x",
}


@pytest.mark.parametrize("breach", _BREACHES.values(), ids=_BREACHES)
def test_a_breach_ends_the_stream(breach: bytes) -> None:
    one, two = socket.socketpair()
    host = End(one, reads_outputs=False)
    host.thread.start()
    two.sendall(HEADER.pack(ACK, STDOUT, 0, 10) + breach)
    host.thread.join(PATIENCE)
    assert isinstance(host.failed, StreamFailed)
    host.free()
    one.close()
    two.close()
