"""`SocketGuest`: a container on this machine's engine that speaks by sockets of its own, past the engine.

The container's first process connects to a socket in the session's directory, once, before it runs anything of a cell; then the
socket's name and the listening end are gone. What comes over that connection (the worker's data channel, the output pipes, each
later worker's channel) makes the session what one of the jail is. Only signals may differ: an ordinary user's host may not
send any to a process of another user, so there they are orders to the supervisor, who sends them.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import time
import weakref
from contextlib import ExitStack
from typing import Final

from ...bridge.guest import GuestLost
from ...bridge.supervised import SupervisedGuest
from ...limits import Limits
from ...options import DockerOptions
from ...runners.container import CANNOT_CONNECT
from ...runners.framing import StreamFailed
from ...waiting import is_readable, wait_until
from ...wire import control
from .contexts import SessionDirectory
from .engine import Engine
from .session_container import RECOVER_SECONDS, START_SECONDS, SessionContainer, settings_for

__all__ = ("NoSockets", "SocketGuest", "open_by_sockets")

#: Signals as orders.
_ORDERS: Final = {
    number: control.dump({"op": "signal", "number": int(number)}) for number in (signal.SIGCONT, signal.SIGSTOP, signal.SIGINT)
}


class NoSockets(Exception):
    """A container of this engine and this process cannot share a socket, or not see each other; another way has to be taken."""


def open_by_sockets(engine: Engine, options: DockerOptions, limits: Limits, *, recovery: bool) -> SocketGuest:
    """Start a container that connects to this process.

    Raises:
        NoSockets: it did not, or cannot be measured from here.
        BackendUnavailable: the engine refuses, or does not answer.
    """
    with ExitStack() as undo:
        directory = SessionDirectory()
        undo.callback(directory.close)
        listener = directory.listen()
        _private.add(listener)
        undo.callback(listener.close)
        container = SessionContainer(engine, options, limits, recovery=recovery, contexts=directory.mount(), sockets=True)
        undo.callback(container.remove)
        undo.callback(container.attached.close)
        container.start()
        guest = SocketGuest(container, _accepted(listener, container))
        undo.callback(guest.close)
        guest.configure(limits)
        # Nobody else ever connects: what names the socket is gone before there is a cell. And its last words have not been needed.
        listener.close()
        directory.close()
        container.attached.close()
        undo.pop_all()
        return guest


def _accepted(listener: socket.socket, container: SessionContainer) -> socket.socket:
    """The container's connection. Raises `NoSockets`, or `BackendUnavailable` if it ends without or takes too long."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(container.attached.read_fd, select.POLLIN)
    ready: dict[int, int] = {}

    def wait(seconds: float | None) -> bool:
        ready.update(poll.poll(None if seconds is None else math.ceil(seconds * 1000)))
        return bool(ready)

    until = time.monotonic() + START_SECONDS
    while wait_until(wait, max(0.0, until - time.monotonic())):
        if listener.fileno() in ready:
            connected, _ = listener.accept()
            _private.add(connected)
            return connected
        try:
            container.attached.read()  # its words
        except BlockingIOError:
            pass
        except (StreamFailed, OSError):
            raise _failure(container, "it ended") from None
        ready.clear()
    raise container.did_not_start("it took too long")


def _failure(container: SessionContainer, why: object) -> Exception:
    """What is to be raised for a container that has ended: the way by sockets may be what it could not take."""
    word = container.last_word()
    return NoSockets(f"a container says that {word}") if word.startswith(CANNOT_CONNECT) else container.did_not_start(why)


class SocketGuest(SupervisedGuest):
    """A guest in such a container. Not thread-safe: its session is."""

    recover_seconds = RECOVER_SECONDS

    def __init__(self, container: SessionContainer, control_socket: socket.socket) -> None:
        """``control_socket``: the connection of the container's first process; closed with this, also if this fails."""
        self._closed = False
        self._may_signal = True
        self._container = container
        with ExitStack() as undo:
            undo.callback(control_socket.close)
            data, self._data_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(data.close)
            undo.callback(self._data_theirs.close)
            out_read, self._out_write = os.pipe()
            undo.callback(os.close, out_read)
            undo.callback(os.close, self._out_write)
            err_read, self._err_write = os.pipe()
            undo.pop_all()
        super().__init__(data, control_socket, {out_read: "stdout", err_read: "stderr"})

    def configure(self, limits: Limits) -> None:
        """Hand over the channels and what the session may use, and wait for its first worker.

        Raises:
            NoSockets: the worker cannot be measured from here, or the container does not get what it is sent.
            BackendUnavailable: a step of its confinement failed.
        """
        try:
            try:
                self._order(settings_for(limits), (self._data_theirs.fileno(), self._out_write, self._err_write))
            finally:
                self._data_theirs.close()
                os.close(self._out_write)
                os.close(self._err_write)
            message, fds = self._receive(START_SECONDS)
        except GuestLost as exc:
            raise _failure(self._container, exc) from None
        if message["op"] != "ready" or len(fds) != 2:
            for fd in fds:
                os.close(fd)
            error = str(message.get("error", "unknown"))[:300]
            raise self._container.did_not_start(f"a step of its confinement failed: {error}")
        os.close(fds[0])
        try:
            self._take_worker(fds[1], inside=True)
            measurable = self.cpu_seconds() is not None and (limits.memory_mb is None or self.memory_headroom_mb() is not None)
        except GuestLost:  # the kernel names no pid: it is of a namespace beside ours, or gone
            measurable = False
        if measurable:
            return
        if is_readable(self._worker):
            raise self._container.did_not_start("its worker has ended")
        raise NoSockets(
            "its processes cannot be seen and measured from here: this process has a pid namespace of its own, or /proc hides them"
        )

    # ---- what `SupervisedGuest` leaves open

    def _supervisor_gone(self) -> GuestLost:
        """See `SupervisedGuest`."""
        return self._container.gone()

    def restart_clock(self, seconds: float | None) -> None:
        """See `Guest.restart_clock`."""
        self._order(self._container.clock_order(seconds))

    # ---- signals

    def _worker_taken(self, *, inside: bool) -> None:
        """See `SupervisedGuest`: the kernel tells who may signal it. It is the same for all workers of a session."""
        try:
            signal.pidfd_send_signal(self._worker, 0)
        except PermissionError:
            self._may_signal = False
        except ProcessLookupError:
            pass  # it is gone already, which is reported

    def _signal(self, number: signal.Signals) -> None:
        if self._may_signal:
            super()._signal(number)
            return
        with contextlib.suppress(OSError):  # its end, or a supervisor that takes nothing any more: the turn, or recovery, sees that
            self._control.send(_ORDERS[number])

    # ---- the end

    def close(self) -> None:
        """See `Guest.close`. In a forked child of the host the container is still the parent's."""
        if self._closed:
            return
        self._closed = True
        self._close_channels()  # the end of the supervisor's socket is the end of a container, too
        self._container.remove()


#: What leads to containers, or lets them connect.
_private: Final[weakref.WeakSet[socket.socket]] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child of the host: give up the child's copies, which would keep containers alive after the host."""
    for sock in list(_private):
        fd = sock.detach()
        if fd >= 0:
            os.close(fd)


os.register_at_fork(after_in_child=_after_fork)
