"""The two ends of a container's stream without a container: on a socket pair, and against a peer that breaks the framing."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox.backends.docker.attached import Attached
from rlm_sandbox.backends.docker.carrier import Carrier
from rlm_sandbox.backends.docker.contexts import SessionDirectory
from rlm_sandbox.backends.docker.undivided import Undivided
from rlm_sandbox.runners.framing import (
    ACK,
    BYTES,
    DATA,
    FILE,
    HEADER,
    MEASURE,
    MESSAGE,
    ORDER,
    STDERR,
    STDOUT,
    STOP,
    VITALS,
    WAKE,
    WINDOW,
    StreamFailed,
)  # fmt: skip
from rlm_sandbox.runners.multiplex import Multiplexer
from rlm_sandbox.waiting import is_readable
from rlm_sandbox.wire import control
from rlm_sandbox.wire.frames import dump_frame, ends_turn

PATIENCE = 30.0
_PIECE = b"\x01\0\0\0"
_DONE = b"".join(dump_frame(["done", "1", None, None, False, None], [], max_bytes=1000))


class RelayStream:
    """The container's standard streams; what it writes gets the engine's header."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.read_fd = self.write_fd = sock.fileno()

    def read(self) -> bytes:
        data = self.sock.recv(1 << 16)
        if not data:
            raise StreamFailed("end")
        return data

    def write(self, data: bytes | memoryview) -> int:
        poll = select.poll()
        poll.register(self.sock, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError
        piece = bytes(data[: 1 << 12])
        self.sock.settimeout(PATIENCE)  # a header is not torn
        self.sock.sendall(_PIECE + len(piece).to_bytes(4, "big") + piece)
        self.sock.setblocking(False)
        return len(piece)


class Inside(Multiplexer):
    """The relay, with a worker's and a supervisor's ends of its descriptors, on a thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.worker, data = socket.socketpair()
        self.supervisor, self.local_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pipes: dict[int, int] = {}
        self.read_ends: dict[int, int] = {}
        for channel in (STDOUT, STDERR):
            self.read_ends[channel], self.pipes[channel] = os.pipe()
            os.set_blocking(self.pipes[channel], False)
        self.worker.settimeout(PATIENCE)
        self.supervisor.settimeout(PATIENCE)
        self.orders: list[tuple[int, int]] = []
        self.stopped = False
        self.failed: BaseException | None = None
        sock.setblocking(False)
        super().__init__(RelayStream(sock), data, self.local_end, self.read_ends)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        try:
            self.run()
        except (StreamFailed, OSError) as exc:
            self.failed = exc

    def on_order(self, order: int, turn: int) -> None:
        if order == WAKE:
            self.set_turn(turn)
            self.stopped = False
        self.orders.append((order, turn))
        if order == MEASURE:
            self.send_vitals()

    def on_remote(self, message: control.Message) -> None:
        if message["op"] == "recover":
            mine, self.next_worker = socket.socketpair()
            self.next_worker.settimeout(PATIENCE)
            self.set_generation(mine, message["generation"])
        control.send(self._local, message)

    def on_local(self, message: control.Message, fds: list[int]) -> None:
        self.send_message(message)

    def on_worker(self, payload: bytes) -> None:
        self.stopped = self.stopped or ends_turn(payload)

    def vitals(self) -> tuple[float, int, bool] | None:
        return 1.5, 2048, self.stopped

    def free(self) -> None:
        self.supervisor.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        for sock in (self.worker, self._data, self.local_end):
            sock.close()
        for fd in (*self.pipes.values(), *self.read_ends.values()):
            os.close(fd)


class Host:
    """The host's end with its pipes."""

    def __init__(self, sock: socket.socket) -> None:
        self.pipes: dict[int, int] = {}
        writes = {}
        for channel in (STDOUT, STDERR):
            self.pipes[channel], writes[channel] = os.pipe()
            os.set_blocking(self.pipes[channel], False)
        self.contexts = SessionDirectory()
        self.carrier = Carrier(Attached(sock), writes, self.contexts)
        self.carrier.wake(0)

    def until(self, condition: Callable[[], bool]) -> None:
        """Serve the stream until something is so."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end
            self.carrier.serve()
            if not condition():
                is_readable(self.carrier.fileno(), 0.01)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self.until(lambda: self.carrier.has_data)
            piece = self.carrier.recv(1 << 16)
            assert piece
            data += piece
        return data

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            self.until(lambda: self.carrier.takes_data)
            left = left[self.carrier.send(left) :]
        self.until(lambda: not self.carrier.unsent)

    def report(self) -> control.Message:
        self.until(lambda: is_readable(self.carrier.reports.fileno()))
        got = control.receive(self.carrier.reports)
        assert got is not None
        return got[0]

    def free(self) -> None:
        self.carrier.close()
        self.contexts.close()
        for fd in self.pipes.values():
            os.close(fd)


@pytest.fixture
def pair() -> Iterator[tuple[Host, Inside]]:
    """Host and relay."""
    one, two = socket.socketpair()
    host, relay = Host(one), Inside(two)
    yield host, relay
    host.free()
    relay.free()
    two.close()


@pytest.fixture
def alone() -> Iterator[tuple[Host, socket.socket]]:
    """A host, and the engine's end of its stream."""
    one, two = socket.socketpair()
    host = Host(one)
    yield host, two
    host.free()
    two.close()


def read_all(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(1 << 16)
        assert piece
        data += piece
    return data


def test_bytes_messages_and_output_arrive(pair: tuple[Host, Inside]) -> None:
    host, relay = pair
    host.carrier.sendall(b"request")
    assert read_all(relay.worker, 7) == b"request"
    os.write(relay.pipes[STDERR], b"printed")
    relay.worker.sendall(b"answer")
    assert host.read(6) == b"answer"
    assert os.read(host.pipes[STDERR], 100) == b"printed"  # it was there before the answer
    assert (host.carrier.cpu_seconds, host.carrier.headroom_mb) == (1.5, 2.0)
    host.carrier.order_supervisor({"op": "order"})
    assert control.receive(relay.supervisor) == ({"op": "order"}, [])
    control.send(relay.supervisor, {"op": "report"})
    assert host.report() == {"op": "report"}


def test_more_than_every_buffer_goes_both_ways(pair: tuple[Host, Inside]) -> None:
    host, relay = pair
    size = 8 * WINDOW
    sending = threading.Thread(target=relay.worker.sendall, args=(bytes(size),))
    sending.start()
    assert len(host.read(size)) == size
    sending.join(PATIENCE)
    reading = threading.Thread(target=read_all, args=(relay.worker, size))
    reading.start()
    host.write(bytes(size))
    host.until(lambda: not reading.is_alive())
    sending.join(PATIENCE)


def _send_until_refused(sock: socket.socket) -> int:
    sent = 0
    try:
        while True:
            sent += sock.send(bytes(1 << 16))
    except TimeoutError:
        return sent


def test_an_unread_channel_holds_up_no_other_and_is_bounded(pair: tuple[Host, Inside]) -> None:
    host, relay = pair
    relay.worker.settimeout(0.3)
    sent = _send_until_refused(relay.worker)
    assert sent < 4 * WINDOW
    control.send(relay.supervisor, {"op": "report"})
    assert host.report() == {"op": "report"}


def test_unread_output_holds_up_no_message(pair: tuple[Host, Inside]) -> None:
    host, relay = pair
    written = 0
    for _ in range(200):
        try:
            written += os.write(relay.pipes[STDOUT], bytes(1 << 16))
        except BlockingIOError:
            time.sleep(0.002)
    assert written < 6 * WINDOW
    host.carrier.order_supervisor({"op": "order"})
    assert control.receive(relay.supervisor) == ({"op": "order"}, [])


def test_what_was_printed_first_is_read_first_however_much_it_is(pair: tuple[Host, Inside]) -> None:
    host, relay = pair
    size = 3 << 16  # more than the session's pipe holds

    def work() -> None:
        for _ in range(3):
            left = memoryview(bytes(1 << 16))
            while left:
                try:
                    left = left[os.write(relay.pipes[STDOUT], left) :]
                except BlockingIOError:
                    time.sleep(0.001)
        relay.worker.sendall(b"answer")
        control.send(relay.supervisor, {"op": "report"})

    thread = threading.Thread(target=work)
    thread.start()
    printed = 0
    end = time.monotonic() + PATIENCE
    while printed < size and time.monotonic() < end:
        host.carrier.serve()
        assert not host.carrier.has_data or printed >= size - (1 << 16)
        assert not is_readable(host.carrier.reports.fileno()) or printed >= size - (1 << 16)
        try:
            printed += len(os.read(host.pipes[STDOUT], 1 << 16))
        except BlockingIOError:
            is_readable(host.carrier.fileno(), 0.01)
    assert printed == size
    assert host.read(6) == b"answer"
    assert host.report() == {"op": "report"}
    thread.join(PATIENCE)


def test_output_of_an_older_turn_is_dropped(pair: tuple[Host, Inside]) -> None:
    host, relay = pair
    host.carrier.wake(1)
    host.carrier.order_supervisor({"op": "turned"})
    control.receive(relay.supervisor)
    os.write(relay.pipes[STDOUT], b"one")
    relay.worker.sendall(b".")
    host.read(1)
    assert os.read(host.pipes[STDOUT], 100) == b"one"
    os.write(relay.pipes[STDOUT], b"between turns")
    host.carrier.wake(2)
    host.carrier.order_supervisor({"op": "turned"})
    control.receive(relay.supervisor)
    os.write(relay.pipes[STDOUT], b"two")
    relay.worker.sendall(b".")
    host.read(1)
    assert os.read(host.pipes[STDOUT], 100) == b"two"


def test_bytes_of_a_dead_generation_reach_nobody(pair: tuple[Host, Inside]) -> None:
    host, relay = pair
    relay.worker.sendall(b"half a fra")
    host.until(lambda: host.carrier.has_data)
    host.carrier.order_supervisor({"op": "recover", "generation": 2})
    host.carrier.begin_generation(2)
    assert not host.carrier.has_data
    assert control.receive(relay.supervisor) == ({"op": "recover", "generation": 2}, [])
    relay.next_worker.sendall(b"whole")
    assert host.read(5) == b"whole"
    relay.next_worker.close()


def test_a_request_to_a_stopped_worker_goes_with_the_order_that_wakes_it(alone: tuple[Host, socket.socket]) -> None:
    host, engine = alone
    host.carrier.stop()
    before = HEADER.size + 3
    read_all(engine, 2 * before)
    host.carrier.send(b"request")
    host.carrier.wake(7)
    piece = engine.recv(1 << 16)
    assert piece[: HEADER.size + 7] == HEADER.pack(BYTES, DATA, 1, 7) + b"request"
    assert HEADER.unpack_from(piece, HEADER.size + 7) == (ORDER, 0, 0, 3)


def test_a_worker_that_the_relay_has_stopped_is_not_ordered_to(pair: tuple[Host, Inside]) -> None:
    host, relay = pair
    relay.worker.sendall(_DONE)
    assert host.read(len(_DONE)) == _DONE
    host.carrier.stop()
    host.carrier.wake(1)
    relay.worker.sendall(b"more than the end")
    host.read(17)
    host.carrier.stop()
    host.carrier.order_supervisor({"op": "now"})
    control.receive(relay.supervisor)
    assert relay.orders[1:] == [(WAKE, 1), (STOP, 0)]


def test_a_worker_that_looked_as_if_its_turn_had_ended_is_woken_again(pair: tuple[Host, Inside]) -> None:
    """An attachment may look like the end of a turn; the host knows better, and waits for more."""
    host, relay = pair
    relay.worker.sendall(_DONE)
    host.read(len(_DONE))
    host.carrier.before_waiting()
    host.carrier.before_waiting()
    host.carrier.order_supervisor({"op": "now"})
    control.receive(relay.supervisor)
    assert relay.orders == [(WAKE, 0), (WAKE, 0)]


def test_the_end_of_a_turn_by_its_looks() -> None:
    assert ends_turn(_DONE)
    others = [_DONE[:-1], _DONE + b"x", b"", b"RL", bytes(100), b"".join(dump_frame(["done", 1], [b"x"], max_bytes=1000))]
    others.append(b"".join(dump_frame(["suspend", [], False], [], max_bytes=1000)))
    assert not any(map(ends_turn, others))


def test_the_end_of_a_container_comes_after_what_it_said(alone: tuple[Host, socket.socket]) -> None:
    host, engine = alone
    words = HEADER.pack(BYTES, STDOUT, 0, 5) + b"words" + HEADER.pack(MESSAGE, 0, 0, 12) + b'{"op": "d" }'
    engine.sendall(_PIECE + len(words).to_bytes(4, "big") + words)
    engine.shutdown(socket.SHUT_RDWR)
    host.until(lambda: host.carrier.ended)
    assert os.read(host.pipes[STDOUT], 100) == b"words"
    assert host.report() == {"op": "d"}
    assert control.receive(host.carrier.reports) is None
    assert host.carrier.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        host.carrier.wake(1)


def test_ctrl_c_does_not_cut_a_frame_in_two() -> None:
    came: list[str] = []

    def handler(_number: int, _frame: FrameType | None) -> None:
        came.append("handled")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    undivided = Undivided()

    def work() -> None:
        with undivided:
            with undivided:
                signal.raise_signal(signal.SIGINT)
            came.append("whole")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert came == ["whole", "handled"]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


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
    "an order to the host": HEADER.pack(ORDER, 0, 0, 3) + b"\x01\0\0",
}


@pytest.mark.parametrize("breach", _BREACHES.values(), ids=_BREACHES)
def test_a_breach_ends_the_stream(alone: tuple[Host, socket.socket], breach: bytes) -> None:
    host, engine = alone
    words = HEADER.pack(ACK, STDOUT, 0, 10) + breach
    engine.sendall(_PIECE + len(words).to_bytes(4, "big") + words)
    host.until(lambda: host.carrier.ended)
    assert control.receive(host.carrier.reports) is None


def test_more_than_a_window_ends_the_stream(alone: tuple[Host, socket.socket]) -> None:
    """A worker on gVisor that has opened the relay's stream: what the host keeps for it is bounded."""
    host, engine = alone
    frame: Any = HEADER.pack(BYTES, DATA, 1, 1 << 16) + bytes(1 << 16)
    piece = _PIECE + len(frame).to_bytes(4, "big") + frame

    def flood() -> None:
        try:
            for _ in range(100):
                engine.sendall(piece)
        except OSError:
            pass

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    host.until(lambda: host.carrier.ended)
    host.carrier.close()
    thread.join(PATIENCE)
