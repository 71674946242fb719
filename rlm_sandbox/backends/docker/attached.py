"""The raw socket of a container's attached stream."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import weakref
from typing import Any, Final

from ...runners.framing import StreamFailed

__all__ = ("Attached",)

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
        self.read_fd: int = self._sock.fileno()
        self.write_fd = self.read_fd
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
        if not (self._left or self._header) and len(data) > _PIECE.size:  # the usual case: one piece, and all of it
            stream, size = _PIECE.unpack_from(data)
            if stream == 1 and size == len(data) - _PIECE.size:
                return data[_PIECE.size :]
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

    def write(self, data: bytes | memoryview) -> int:
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
