"""The host's end of a container's attached stream, and the thread that serves it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import struct
import threading
import weakref
from typing import Any, Final

from ...runners import control
from ...runners.multiplex import STDERR, STDOUT, Multiplexer, StreamFailed
from .contexts import SessionDirectory
from .volumes import ContextVolume

__all__ = ("Attached", "HostEnd")

log: Final = logging.getLogger("rlm_sandbox.docker")
_CHUNK: Final = 1 << 17
#: The engine's header before each piece: stream 1 or 2, and the length.
_PIECE: Final = struct.Struct(">BxxxI")
_MAX_WORDS: Final = 4096


class Attached:
    """The raw socket of an attach request. Standard output is the stream; standard error is kept for error messages."""

    def __init__(self, response: Any) -> None:
        self._response = response  # docker-py's wrapper: it holds the connection
        self._sock: socket.socket = getattr(response, "_sock", response)
        self._sock.setblocking(False)
        self.read_fd = self.write_fd = self._sock.fileno()
        self._header = b""
        self._left = 0
        self._stream = 0
        self._owner = os.getpid()
        _open.add(self)
        self.words = b""
        """What the container wrote to standard error: supervisor and relay only, the worker does not hold it."""

    def read(self) -> bytes:
        """See `Stream.read`."""
        try:
            data = self._sock.recv(_CHUNK)
            while isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():  # no poll tells of what is decrypted already
                data += self._sock.recv(_CHUNK)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        if not data:
            raise StreamFailed("the container ended")
        found = []
        view = memoryview(data)
        while view:
            if not self._left:
                take = _PIECE.size - len(self._header)
                self._header += view[:take]
                view = view[take:]
                if len(self._header) < _PIECE.size:
                    break
                self._stream, self._left = _PIECE.unpack(self._header)
                self._header = b""
                continue
            part, view = view[: self._left], view[self._left :]
            self._left -= len(part)
            if self._stream == 1:
                found.append(part)
            else:
                self.words = (self.words + part)[-_MAX_WORDS:]
        return b"".join(found)

    def write(self, data: memoryview) -> int:
        """See `Stream.write`."""
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def close(self) -> None:
        """Detach, which closes the container's standard input and so ends it. Idempotent."""
        if self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        # The HTTP response below it first; it flushes a file that the wrapper's close would have closed.
        for part in (getattr(self._response, "_response", None), self._response, self._sock):
            if part is not None:
                with contextlib.suppress(OSError, ValueError):
                    part.close()

    def forget(self) -> None:
        """In a forked child of the host: give up the child's copy, which would keep the container alive after the host."""
        fd = self._sock.detach()
        if fd >= 0:
            os.close(fd)


_open: Final[weakref.WeakSet[Attached]] = weakref.WeakSet()


def _after_fork() -> None:
    for attached in list(_open):
        attached.forget()


os.register_at_fork(after_in_child=_after_fork)


class HostEnd(Multiplexer):
    """Runs on a thread of its own; a session sees the other ends of its descriptors, and the worker's clock."""

    def __init__(
        self,
        attached: Attached,
        data: socket.socket,
        local: socket.socket,
        outputs: dict[int, int],
        contexts: SessionDirectory | ContextVolume,
    ) -> None:
        super().__init__(attached, data, local, outputs, reads_outputs=False)
        self._attached = attached
        self._contexts = contexts
        self.cpu_seconds: float | None = None
        self.headroom_mb: float | None = None
        self._thread = threading.Thread(target=self._serve, name="rlm-sandbox-docker", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        self._thread.join(seconds)

    def _serve(self) -> None:
        try:
            self.run()
        except (StreamFailed, OSError, ValueError) as exc:
            log.debug("the stream of a container ended: %s", exc)  # the session sees the end of its sockets
        finally:
            self._data.close()
            self._local.close()
            self._attached.close()
            for channel in (STDOUT, STDERR):
                os.close(self._ports[channel].fd)
            for _, files in self._port.pending:
                for fd in files:
                    os.close(fd)

    def on_local(self, message: control.Message, fds: list[int]) -> None:
        """An order of the session; with one that brings a new worker comes its data socket."""
        op = message["op"]
        if op == "wake":
            self.set_turn(int(message["turn"]))
        for fd in fds:
            self.set_generation(socket.socket(fileno=fd), int(message["generation"]))
        self.send_message(message)
        if op == "settings":
            self.authenticate(bytes.fromhex(message["key"]))

    def on_remote(self, message: control.Message) -> None:
        """A report of the supervisor or the relay, for the session."""
        control.send(self._local, message)

    def on_vitals(self, cpu_seconds: float, headroom_kb: int) -> None:
        """See `Multiplexer.on_vitals`."""
        self.cpu_seconds = cpu_seconds
        self.headroom_mb = headroom_kb / 1024 if headroom_kb >= 0 else None

    def on_descriptor(self, fd: int) -> str:
        """A context's file: its name where the container sees it."""
        try:
            return self._contexts.link(fd)
        finally:
            os.close(fd)
