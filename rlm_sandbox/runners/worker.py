"""The worker: a `GuestSession` on a stream socket, and the moment it forks its standby.

By the time this runs, the process is confined. It holds the data channel, the birth socket, and its three standard
descriptors, and nothing else.
"""

from __future__ import annotations

import io
import os
import select
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from types import FrameType
from typing import Any, Final, NoReturn

from ..wire.codec import Attachment
from ..wire.frames import PROTOCOL_VERSION, FrameReader, dump_frame
from ..wire.messages import FRAME_OVERHEAD, BindData, BindText, Exec, Hello, Message, Protect, dump_message, load_message
from . import mapped_text
from .output import CellOutput
from .session import GuestSession

__all__ = ("Worker", "await_birth", "main", "prepare")

#: The guest is the receiving end of the host's caps, so it needs none of its own beyond its memory.
_MAX_FRAME: Final = 1 << 40
#: Received into one buffer made at the start: a worker at its memory limit must still take requests.
_CHUNK: Final = 1 << 16
#: Linux; elsewhere a descriptor of a message is inherited by programs the worker starts, which it does not.
_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_DESCRIPTOR_SPACE: Final = socket.CMSG_SPACE(4)
_THREAD_STACK: Final = 512 * 1024
#: A standby is woken with a data channel, and with two output pipes if it becomes a copy of its session.
_WAKING_SPACE: Final = socket.CMSG_SPACE(3 * 4)
HELLO: Final = b"H"
CANNOT: Final = b"F"


class _SocketTransport:
    """Frames on a blocking stream socket. The end of the stream ends the process: there is nobody to serve."""

    def __init__(self, data_fd: int) -> None:
        self._sock = socket.socket(fileno=data_fd)
        self.main_thread = get_ident()
        self._shielded = 0
        self._interrupted = False
        self.interruptible = False
        self.descriptors: list[int] = []
        self._sizes = _MAX_FRAME
        self._view = memoryview(bytearray(_CHUNK))
        self._buffers = [self._view]
        self._unread = memoryview(b"")

    def replace(self, data_fd: int) -> None:
        """Go on with another channel."""
        self._sock.close()
        self._sock = socket.socket(fileno=data_fd)
        self._unread = memoryview(b"")

    def close(self) -> None:
        """Give up the present channel."""
        self._sock.close()

    def limit(self, max_bytes: int) -> None:
        """Refuse to send frames larger than the host takes."""
        self._sizes = max_bytes

    # An interrupt in the middle of a frame would desynchronise the channel, so it waits until the frame is through.

    def on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """SIGINT: raise KeyboardInterrupt in cell code, at once or after the present frame."""
        if not self.interruptible:
            return
        if self._shielded:
            self._interrupted = True
        else:
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        """Frames go through whole from here on."""
        if get_ident() == self.main_thread:  # signals are handled on the main thread only
            self._shielded += 1

    def __exit__(self, *_exc: object) -> None:
        if get_ident() == self.main_thread:
            self._shielded -= 1
            if self._interrupted and not self._shielded:
                self._interrupted = False
                if self.interruptible:
                    raise KeyboardInterrupt

    def send(self, message: Message, attachments: list[Attachment]) -> None:
        """Send one frame. Raises FrameTooLarge and sends nothing if the host would refuse it."""
        buffers = dump_frame(dump_message(message), attachments, max_bytes=self._sizes)
        with self:
            try:
                for buffer in buffers:
                    self._sock.sendall(buffer)
            except OSError:
                os._exit(0)

    def receive(self) -> tuple[Any, list[Attachment]]:
        """The next frame. Descriptors that came with it are in ``descriptors``."""
        with self:
            return self._receive()

    def exchange(self, message: Message, attachments: list[Attachment]) -> tuple[Any, list[Attachment]]:
        """Send one frame and take the answer. Not interrupted in between: the answer would be taken for the next request."""
        with self:
            self.send(message, attachments)
            return self._receive()

    def _receive(self) -> tuple[Any, list[Attachment]]:
        reader = FrameReader(max_bytes=_MAX_FRAME)
        while True:
            frame = self._feed(reader)
            if frame is not None:
                return frame
            size, ancillary, _flags, _ = self._sock.recvmsg_into(self._buffers, _DESCRIPTOR_SPACE, _CLOEXEC)
            if not size:
                os._exit(0)
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self.descriptors.append(struct.unpack("=i", raw[:4])[0])
            frame = reader.whole(bytes(self._view[:size])) if size < _CHUNK else None
            if frame is not None:
                return frame
            self._unread = self._view[:size]

    def _feed(self, reader: FrameReader) -> tuple[Any, list[Attachment]] | None:
        """What was received goes to the parser, up to the end of a frame. A request may follow an order to make a standby
        before that order was read, if a thread of the cell spoke for the runner; so what is left is kept."""
        while self._unread:
            take = min(len(self._unread), reader.wanted)
            frame = reader.feed(self._unread[:take])
            self._unread = self._unread[take:]
            if frame is not None:
                return frame
        return None


class Worker:
    """One worker: its channel, its session, and the moments between turns."""

    def __init__(
        self,
        data_fd: int,
        birth: socket.socket,
        generation: int,
        outputs: tuple[CellOutput, ...],
        fork: Callable[[socket.socket], int] | None,
    ) -> None:
        self._outputs = outputs
        self._birth = birth
        self._fork = fork
        self._generation = generation
        self._transport = _SocketTransport(data_fd)
        self._session = GuestSession(self._transport, self._set_interruptible, self._map_text, map_data=self._map_data)

    def end(self) -> None:
        """Give up its channel."""
        self._transport.close()

    def _set_interruptible(self, value: bool) -> None:
        if value:
            for stream in self._outputs:
                stream.begin_cell()
        self._transport.interruptible = value

    def _map_text(self, message: BindText) -> str:
        fd = self._transport.descriptors.pop()
        try:
            return mapped_text.load_text(fd, message.chars, message.width, message.ascii_only, mapped=MAPPED)
        finally:
            os.close(fd)  # a descriptor left open would give locks, modes and an offset shared with other sessions

    def _map_data(self, message: BindData) -> bytes:
        fd = self._transport.descriptors.pop()
        try:
            return mapped_text.load_bytes(fd, message.size, mapped=MAPPED)
        finally:
            os.close(fd)

    def serve(self) -> NoReturn:
        signal.signal(signal.SIGINT, self._transport.on_interrupt)
        self._hello()
        while True:
            self.serve_one()

    def serve_one(self) -> None:
        """Wait for a request and serve it."""
        header, attachments = self._transport.receive()
        if header == [Protect.op]:
            self._fork_standby()
        else:
            if header[0] == "configure":
                limit = header[2]
                self._transport.limit(_MAX_FRAME if limit is None else limit + FRAME_OVERHEAD)
            self._session.handle(header, attachments)

    def _hello(self) -> None:
        self._transport.send(Hello(PROTOCOL_VERSION, self._generation), [])

    def _fork_standby(self) -> None:
        """Fork; the child becomes the standby and returns from here only when it is woken, with a new channel."""
        self._reap()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # threads of cells do not survive into the standby, and that is documented
                pid = _fork() if self._fork is None else self._fork(self._birth)
        except (OSError, MemoryError):
            # Not waiting: outside a ticket nobody reads, and a thread of the cell may have filled the socket.
            with suppress(BlockingIOError):
                self._birth.send(CANNOT, socket.MSG_DONTWAIT)
            return
        if pid:
            self._rehearse()
            return
        self._transport.close()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the kernel sends it when the worker's death orphans our stopped group
        _setpgid(0, 0)
        self._session.after_fork()
        # The socket is that of every worker of the session: a cell may have made it one that does not wait, or filled it.
        while True:
            await_birth(self._birth, select.POLLOUT)
            with suppress(BlockingIOError):
                self._birth.send(HELLO)
                break
        fds: list[int] = []
        while not fds:  # what was meant for the worker before us brings no descriptor
            await_birth(self._birth, select.POLLIN)
            try:
                text, ancillary, _, _ = self._birth.recvmsg(16, _WAKING_SPACE, _CLOEXEC)
            except BlockingIOError:
                continue
            if not text:
                os._exit(0)
            fds = [
                fd
                for level, kind, raw in ancillary
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                for (fd,) in struct.iter_unpack("=i", raw)
            ]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for target, fd in zip((1, 2), fds[1:], strict=False):  # a copy of a session prints elsewhere
            os.dup2(fd, target)
            os.close(fd)
        self._transport.replace(fds[0])
        self._hello()

    def _rehearse(self) -> None:
        """Go through the motions of a turn after a fork, between turns: the copy-on-write faults of the next one, some 200
        of them, are paid now. Cells may have patched what this uses; a failure costs nothing but the time."""
        try:
            reader = FrameReader(max_bytes=_MAX_FRAME)
            frame = b"".join(dump_frame(dump_message(Exec(0, "x = 1\nx", [], None)), [], max_bytes=_MAX_FRAME))
            header = None
            while frame:
                wanted = reader.wanted
                got, frame = reader.feed(frame[:wanted]), frame[wanted:]
                header = got[0] if got is not None else None
            self._session.rehearse(load_message(header, (Exec,)))
        except Exception:  # noqa: BLE001 - see above
            return

    def _reap(self) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


# Taken now, so that a cell that replaces them in ``os`` for its own ends does not cost itself its standby.
_fork: Final = os.fork
_setpgid: Final = os.setpgid


def await_birth(birth: socket.socket, event: int) -> None:
    """Wait until the birth socket takes, or has, something, or has ended: a cell may have made it one that does not wait."""
    poll = select.poll()
    poll.register(birth, event)
    poll.poll()


#: Set once, in the zygote: whether a mapped text passes the interpreter's self-test.
MAPPED = False


def prepare(self_test: int | None = None) -> None:
    """In the zygote: decide, in a throw-away child, whether contexts can be mapped as a ``str``.

    ``self_test``: the process of `mapped_text.begin_self_test`, where that has been called already.
    """
    global MAPPED
    MAPPED = mapped_text.end_self_test(mapped_text.begin_self_test() if self_test is None else self_test)


def main(data_fd: int, birth: socket.socket, generation: int, fork: Callable[[socket.socket], int] | None = None) -> NoReturn:
    """Be the worker of a session. ``fork``: how it makes its standby, where that is not `os.fork`."""
    threading.stack_size(_THREAD_STACK)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    outputs = (CellOutput(io.FileIO(1, "w", closefd=False)), CellOutput(io.FileIO(2, "w", closefd=False)))
    sys.stdout, sys.stderr = outputs
    sys.__stdout__, sys.__stderr__ = outputs  # type: ignore[misc]
    sys.argv = [""]
    os.environ.clear()
    Worker(data_fd, birth, generation, outputs, fork).serve()
