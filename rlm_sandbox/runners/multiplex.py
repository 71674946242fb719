"""The container's end of the stream: it carries between the stream and the descriptors that a session without a container has."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import Final

from ..wire import control
from .framing import BYTES, CHUNK, DATA, WINDOW, Framing, Port, Stream

__all__ = ("Multiplexer",)

#: Reads of one pipe before something that was sent after it goes on; a pipe holds 64 KiB.
_DRAIN_READS: Final = 4


class Multiplexer(Framing):
    """Moves bytes between the stream and local descriptors until either side ends. A subclass says what messages mean."""

    def __init__(self, stream: Stream, data: socket.socket, local: socket.socket, outputs: dict[int, int]) -> None:
        """
        Args:
            stream: to the host.
            data: to the worker.
            local: to the supervisor.
            outputs: what the worker prints, by channel.
        """
        super().__init__(
            stream,
            {DATA: Port(DATA, data.fileno()), **{channel: Port(channel, fd) for channel, fd in outputs.items()}},
            inside=True,
        )
        self._data = data
        self._local = local
        for fd in (data.fileno(), local.fileno(), *outputs.values()):
            os.set_blocking(fd, False)

    # ---- what subclasses add

    def on_local(self, message: control.Message, fds: list[int]) -> None:
        """A message of the supervisor; the descriptors are the receiver's."""
        raise NotImplementedError

    def vitals(self) -> tuple[float, int, bool] | None:
        """The worker's CPU time in seconds, what it may still allocate in KiB (below 0: not known), and whether it is stopped."""
        return None

    def on_worker(self, payload: bytes) -> None:
        """The worker sent this; the host gets it next."""

    # ---- the loop

    def run(self) -> None:
        """Until the supervisor's socket or the stream ends. Raises StreamFailed or OSError for the latter."""
        self._serve_channels()
        self._flush_stream()  # last words

    def _serve_channels(self) -> None:
        stream, local = self._stream, self._local.fileno()
        registered: list[tuple[int, int]] = []
        poll = select.poll()
        while True:
            if self._outbox:
                self._flush_stream()
            wanted = self._wanted(local)
            if wanted != registered:
                registered, poll = wanted, select.poll()
                for fd, mask in wanted:
                    poll.register(fd, mask)
            data = self._port
            ready = dict(poll.poll())
            if local in ready and not self._take_local():
                return
            if ready.get(stream.read_fd, 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._take_stream()
            event = ready.get(data.fd, 0)
            sent = bool(event & (select.POLLIN | select.POLLHUP))
            for port in self._outputs:
                # The kernel looked at it after the data: what the worker printed before it sent is there to be seen.
                if port.fd in ready or (sent and port.credit <= 0):
                    self._drain_output(port, _DRAIN_READS if sent else 1)
            if data is not self._port:
                continue  # another generation's
            if event & select.POLLOUT:
                self._flush_data()
            if sent:
                self._take_data()

    def _wanted(self, local: int) -> list[tuple[int, int]]:
        """What to wait for. The kernel looks in this order: the data before what was printed."""
        data, stream = self._port, self._stream
        # Too much output is unread: hold the data back as well, it could not be delivered before it anyway.
        flooded = any(port.credit < -WINDOW for port in self._outputs)
        mask = select.POLLIN if data.credit > 0 and not flooded and not data.closed else 0
        if data.pending:
            mask |= select.POLLOUT
        wanted = [(data.fd, mask)] if mask else []
        wanted += [(port.fd, select.POLLIN) for port in self._outputs if port.credit > 0 and not port.closed]
        wanted += [(local, select.POLLIN), (stream.read_fd, select.POLLIN)]
        if self._outbox:
            if stream.read_fd == stream.write_fd:
                wanted[-1] = (stream.read_fd, select.POLLIN | select.POLLOUT)
            else:
                wanted.append((stream.write_fd, select.POLLOUT))
        return wanted

    # ---- to the stream

    def send_vitals(self) -> None:
        """Tell the host how the worker is, if that can be told."""
        found = self.vitals()
        if found is not None:
            self._send_measured(*found)

    def set_turn(self, number: int) -> None:
        """From now on output belongs to another turn. What is in the pipes is of the old one."""
        self._drain_outputs()
        self._turn = number & 0xFFFF

    def set_generation(self, data: socket.socket, number: int) -> None:
        """Go on with another data socket: what is of the old one is dropped."""
        for _, fds in self._port.pending:
            for fd in fds:
                os.close(fd)
        for fd in self._files:
            os.close(fd)
        self._files = ()
        self._data.close()
        data.setblocking(False)
        self._data = data
        self._port = self._ports[DATA] = Port(DATA, data.fileno())
        self._generation = number & 0xFFFF

    def _take_local(self) -> bool:
        """Messages of the supervisor. False at its end."""
        while True:
            try:
                got = control.receive(self._local)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if got is None:
                return False
            self._drain_outputs()
            self.on_local(*got)

    def _take_data(self) -> None:
        port = self._port
        try:
            payload = self._data.recv(min(CHUNK, port.credit))
        except BlockingIOError:
            return
        except OSError:
            payload = b""
        self.on_worker(payload)
        self.send_vitals()
        port.credit -= len(payload)
        port.closed = not payload
        self._send(BYTES, DATA, self._generation, payload)

    def _take_output(self, port: Port) -> bool:
        try:
            payload = os.read(port.fd, CHUNK)
        except BlockingIOError:
            return False
        port.closed = not payload
        if payload:
            port.credit -= len(payload)
            self._send(BYTES, port.channel, self._turn, payload)
        return bool(payload)

    def _drain_output(self, port: Port, reads: int = _DRAIN_READS) -> None:
        for _ in range(reads):
            if not self._take_output(port):
                break

    def _drain_outputs(self) -> None:
        for port in self._outputs:
            self._drain_output(port)

    # ---- from the stream

    def on_bytes(self, port: Port, payload: bytes) -> None:
        """See `Framing.on_bytes`: for the worker."""
        files, self._files = self._files, ()
        port.pending.append((memoryview(payload), files))
        if len(port.pending) == 1:
            self._flush_data()

    def _flush_data(self) -> None:
        port = self._port
        while port.pending:
            payload, files = port.pending[0]
            try:
                if not payload:
                    self._data.shutdown(socket.SHUT_WR)
                    sent = 0
                elif files:
                    rights = struct.pack(f"={len(files)}i", *files)
                    sent = self._data.sendmsg([payload], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                else:
                    sent = self._data.send(payload)
            except BlockingIOError:
                return
            except OSError:
                sent = len(payload)  # the reader is gone; somebody else says how
            for fd in files:
                os.close(fd)
            self._acknowledge(port, sent)
            if sent == len(payload):
                port.pending.popleft()
            else:
                port.pending[0] = (payload[sent:], ())
