"""The host's end of a container's attached stream: served by whichever thread waits for the session, as it waits.

No thread stands between the session and the engine's socket: handing over to one and back cost more than the engine itself.
Between turns nobody serves it, and nothing needs it: what the container says meanwhile stays in its windows.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, Final

from ...runners.framing import BYTES, CHUNK, DATA, FILE, STOP, WAKE, WINDOW, Framing, Port, StreamFailed
from ...wire import control
from .attached import Attached
from .contexts import SessionDirectory
from .undivided import Undivided
from .volumes import ContextVolume

__all__ = ("Carrier",)

log: Final = logging.getLogger("rlm_sandbox.docker")


_TICKET: Final[control.Message] = {"op": "ticket"}
#: Reports that the session has not taken.
_MOST_REPORTS: Final = 64
#: As a plain number: the flag itself is an enumeration, whose operators are slow.
_PEEK: Final = int(socket.MSG_PEEK)
#: More than any window lets through is a breach.
_MOST_WAITING: Final = 4 * WINDOW
#: An order is a few bytes; an engine that takes none for so long has gone wrong.
_ORDER_SECONDS: Final = 1.0


class Carrier(Framing):
    """A worker's data channel, as a session uses one (`bridge.guest.DataChannel`), and what else the stream carries.

    Reports of the supervisor and what the worker prints go on to a socket and two pipes, where the session looks for them.
    """

    def __init__(self, attached: Attached, outputs: dict[int, int], contexts: SessionDirectory | ContextVolume) -> None:
        """
        Args:
            attached: the engine's stream.
            outputs: the writing ends of the pipes for what the worker prints, by channel. `close` closes them.
            contexts: where a context's file is put for the container to see.

        Raises:
            OSError: this process has no descriptors left.
        """
        self.reports, self._local = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for fd in (self.reports.fileno(), self._local.fileno(), *outputs.values()):
            os.set_blocking(fd, False)
        ports = {DATA: Port(DATA, -1), **{channel: Port(channel, fd) for channel, fd in outputs.items()}}
        super().__init__(attached, ports, inside=False)
        self._attached = attached
        self._contexts = contexts
        self._unreported: list[control.Message] = []
        self._passed = False
        self.ended = False
        """Whether the stream has ended; what came before may still be waiting."""
        self.corked = True
        """Whether the worker is stopped: what is sent to it then goes with the order that wakes it."""
        self._undivided = Undivided()
        self._stopped_since = self._stopped = False
        self._holding = False
        self.cpu_seconds: float | None = None
        self.headroom_mb: float | None = None
        self.measured_at = 0.0

    def close(self) -> None:
        """End the container. Idempotent."""
        self.ended = True
        self.reports.close()
        self._local.close()
        for port in self._outputs:
            if not port.closed:
                port.closed = True
                os.close(port.fd)
        self._attached.close()

    # ---- for who waits (`bridge.guest.SharedStream`)

    @property
    def unsent(self) -> bool:
        """See `SharedStream.unsent`."""
        return bool(self._outbox) and not self.corked and not self.ended

    @property
    def has_data(self) -> bool:
        """See `SharedStream.has_data`."""
        return not self._holding and (bool(self._port.pending) or self._port.closed or self.ended)

    @property
    def takes_data(self) -> bool:
        """See `SharedStream.takes_data`."""
        return self.ended or (self._port.credit > 0 and not self.unsent)

    def serve(self) -> bool:
        """See `SharedStream.serve`."""
        with self._undivided:
            if not self.ended:
                try:
                    self._take_stream()
                    if self._outbox and not self.corked:
                        self._flush_stream()
                except (StreamFailed, OSError, ValueError) as exc:
                    self._fail(exc)
                except BaseException:  # a signal's handler raised in the middle of a frame
                    self._fail(InterruptedError("it was interrupted"))
                    raise
            if self.ended or self.held:
                self._pass_on()
            passed, self._passed = self._passed, False
            return passed

    @property
    def held(self) -> bool:
        """See `SharedStream.held`."""
        return bool(self._unreported) or self._holding

    def _pass_on(self) -> None:
        for port in self._outputs:
            self._flush_output(port)
        self._holding = any(port.pending for port in self._outputs)
        try:
            while self._unreported and not self._holding:
                control.send(self._local, self._unreported[0])
                del self._unreported[0]
                self._passed = True
        except BlockingIOError:
            return
        except OSError:
            self._unreported.clear()
        if self.ended and not (self._unreported or self._holding):
            self._local.close()  # the session sees the end, after all that was said before it
            self._passed = True

    def _fail(self, exc: Exception) -> None:
        log.debug("the stream of a container ended: %s", exc)
        self.ended = True
        self._outbox.clear()

    def _flush_now(self) -> None:
        if self.ended:
            raise BrokenPipeError(errno.EPIPE, "the container is gone")
        with self._undivided:
            try:
                self._flush_stream()
            except (StreamFailed, OSError) as exc:
                self._fail(exc)
                raise BrokenPipeError(errno.EPIPE, "the container is gone") from None
            except BaseException:
                self._fail(InterruptedError("it was interrupted"))
                raise

    # ---- a data channel (`bridge.guest.DataChannel`)

    def fileno(self) -> int:
        """What is ready when something has come on any of the stream's channels."""
        return self._attached.read_fd

    def send(self, data: bytes | memoryview) -> int:
        """See `DataChannel.send`."""
        if self.ended:
            raise BrokenPipeError(errno.EPIPE, "the container is gone")
        port = self._port
        if port.credit <= 0 or self.unsent:
            raise BlockingIOError
        size = min(CHUNK, port.credit, len(data))
        self._send(BYTES, DATA, self._generation, bytes(data[:size]))
        port.credit -= size
        if not self.corked:
            self._flush_now()
        return size

    def sendall(self, data: bytes) -> None:
        """See `DataChannel.sendall`; it goes at once, whatever the worker has taken."""
        self._send(BYTES, DATA, self._generation, data)
        self._port.credit -= len(data)
        self._flush_now()

    def sendmsg(self, buffers: Sequence[bytes | memoryview], ancillary: Sequence[tuple[int, int, Any]] = ()) -> int:
        """See `DataChannel.sendmsg`; a descriptor's file appears in the container under a name."""
        (data,) = buffers
        if not self.takes_data:
            raise BlockingIOError
        for level, kind, fds in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                for fd in array.array("i", bytes(fds)):
                    self._send(FILE, DATA, self._generation, self._contexts.link(fd).encode())
        return int(self.send(data))

    def recv(self, size: int, flags: int = 0) -> bytes:
        """See `DataChannel.recv`."""
        if not self.has_data:
            self.serve()
            if not self.has_data:
                raise BlockingIOError
        port = self._port
        if not port.pending:
            return b""
        payload = port.pending[0][0]
        part = bytes(payload[:size])
        if not flags & _PEEK:
            if len(part) == len(payload):
                port.pending.popleft()
            else:
                port.pending[0] = (payload[len(part) :], ())
            port.waiting -= len(part)
            self._acknowledge(port, len(part))
        return part

    # ---- orders

    def wake(self, turn: int) -> None:
        """The worker runs from now on. What was sent to it while it was stopped goes in the same piece. Raises OSError."""
        self._turn = turn
        self.corked = self._stopped = False
        self.send_order(WAKE, turn)
        self._flush_now()

    def stop(self) -> None:
        """The worker is stopped from now on, unless that has been done with the end of its turn. Raises OSError."""
        if not self._stopped:
            self.order(STOP)
        self.corked = True

    def order(self, order: int) -> None:
        """Another of the short orders. Raises OSError: the container is gone."""
        self.send_order(order)
        self._flush_order()

    def prepare_ticket(self) -> None:
        """A ticket for a standby, which the order to fork follows in the same piece; the worker runs for that."""
        if self._stopped:
            self.send_order(WAKE, self._turn)
        self.corked = self._stopped = False
        self.send_message(_TICKET)

    def before_waiting(self) -> None:
        """See `SharedStream.before_waiting`."""
        if self._stopped and not (self.corked or self.ended):
            with contextlib.suppress(OSError):  # `serve` tells
                self.wake(self._turn)

    def order_supervisor(self, message: control.Message) -> None:
        """An order with more words. Raises OSError: the container is gone."""
        self.send_message(message)
        self._flush_order()

    def settings(self, message: control.Message) -> None:
        """The first of all orders; from now on what matters carries a digest with its key. Raises OSError."""
        self.order_supervisor(message)
        self.authenticate(bytes.fromhex(message["key"]))

    def begin_generation(self, number: int) -> None:
        """What comes from now on is of another worker; what is left of the old one is dropped."""
        self._port = self._ports[DATA] = Port(DATA, -1)
        self._generation = number & 0xFFFF
        for port in self._outputs:
            port.pending.clear()
            self._acknowledge(port, port.waiting)
            port.waiting = 0
        self._holding = self._stopped = False

    def _flush_order(self) -> None:
        until = time.monotonic() + _ORDER_SECONDS
        self._flush_now()
        while self._outbox:
            poll = select.poll()
            poll.register(self._attached.write_fd, select.POLLOUT)
            left = until - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return  # it goes with what follows
            self._flush_now()

    # ---- from the stream

    def on_remote(self, message: control.Message) -> None:
        """A report of the supervisor or the relay, for the session."""
        self._unreported.append(message)
        if len(self._unreported) > _MOST_REPORTS:
            raise StreamFailed("it reports without end")

    def on_vitals(self, cpu_seconds: float, headroom_kb: int, stopped: bool) -> None:
        """See `Framing.on_vitals`."""
        self._stopped_since = stopped
        self.measured_at = time.monotonic()
        self.cpu_seconds = cpu_seconds
        self.headroom_mb = headroom_kb / 1024 if headroom_kb >= 0 else None

    def on_bytes(self, port: Port, payload: bytes) -> None:
        """See `Framing.on_bytes`."""
        if not payload:
            port.closed = port is self._port
            return
        port.pending.append((memoryview(payload), ()))
        port.waiting += len(payload)
        if port.waiting > _MOST_WAITING:
            raise StreamFailed("it sent more than its window")
        if port is not self._port:
            self._flush_output(port)
            self._holding = any(output.pending for output in self._outputs)
        else:
            self._stopped, self._stopped_since = self._stopped_since, False

    def _flush_output(self, port: Port) -> None:
        while port.pending:
            payload = port.pending[0][0]
            try:
                sent = os.write(port.fd, payload)
            except BlockingIOError:
                return
            except OSError:
                sent = len(payload)  # nobody reads it any more
            self._passed = True
            port.waiting -= sent
            self._acknowledge(port, sent)
            if sent == len(payload):
                port.pending.popleft()
            else:
                port.pending[0] = (payload[sent:], ())
