"""`SocketGuest`: a container on this machine's engine that speaks by sockets of its own, past the engine.

The container's first process connects to a socket in the session's directory, once, before it runs anything of a cell; then the
socket's name and the listening end are gone. What comes over that connection (the worker's data channel, the output pipes, each
later worker's channel) makes the session what one of the jail is. Only signals may differ: an ordinary user's host may not
send any to a process of another user, so there they are orders to the supervisor, who sends them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import weakref
from contextlib import ExitStack
from typing import Final

from ...bridge.guest import GuestLost
from ...bridge.supervised import SupervisedGuest
from ...limits import Limits
from ...options import DockerOptions
from ...runners.framing import StreamFailed
from ...waiting import wait_until
from ...wire import control
from .contexts import SessionDirectory
from .engine import Engine
from .session_container import SESSION_SLACK_SECONDS, START_SECONDS, SessionContainer

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
        undo.callback(listener.close)
        container = SessionContainer(engine, options, limits, recovery=recovery, contexts=directory.mount(), sockets=True)
        undo.callback(container.remove)
        undo.callback(container.attached.close)
        container.start()
        guest = SocketGuest(container, _accepted(listener, container), limits)
        undo.callback(guest.close)
        guest.configure(limits)
        undo.pop_all()
    # Nobody else ever connects: what names the socket is gone before there is a cell. Nothing was attached for but its last words.
    listener.close()
    directory.close()
    container.attached.close()
    return guest


def _accepted(listener: socket.socket, container: SessionContainer) -> socket.socket:
    """The container's connection. Raises `NoSockets` if it ends without."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(container.attached.read_fd, select.POLLIN)
    ready: dict[int, int] = {}

    def wait(seconds: float | None) -> bool:
        ready.update(poll.poll(None if seconds is None else seconds * 1000))
        return bool(ready)

    while wait_until(wait, START_SECONDS):
        if listener.fileno() in ready:
            connected, _ = listener.accept()
            return connected
        try:
            container.attached.read()  # its words
        except (StreamFailed, BlockingIOError, OSError) as exc:
            if not isinstance(exc, BlockingIOError):
                raise NoSockets(str(container.did_not_start(exc).reason)) from None
        ready.clear()
    raise NoSockets("a container did not connect to its host")


class SocketGuest(SupervisedGuest):
    """A guest in such a container. Not thread-safe: its session is."""

    #: What is left of the 2 s that recovery may take is for another container: about 0.5 s.
    recover_seconds = 1.0

    def __init__(self, container: SessionContainer, control_socket: socket.socket, limits: Limits) -> None:
        """``control_socket``: the connection of the container's first process; closed with this, also if this fails."""
        _connections.add(control_socket)
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
            NoSockets: the worker cannot be measured from here.
            BackendUnavailable: a step of its confinement failed.
        """
        settings: control.Message = {
            "op": "settings",
            "memory_mb": limits.memory_mb,
            "disk_mb": limits.disk_mb,
            "seconds": None if limits.session_seconds is None else limits.session_seconds + SESSION_SLACK_SECONDS,
        }
        try:
            try:
                self._order(settings, (self._data_theirs.fileno(), self._out_write, self._err_write))
            finally:
                self._data_theirs.close()
                os.close(self._out_write)
                os.close(self._err_write)
            message, fds = self._receive(START_SECONDS)
        except GuestLost as exc:
            raise self._container.did_not_start(exc) from None
        if message["op"] != "ready" or len(fds) != 2:
            for fd in fds:
                os.close(fd)
            error = str(message.get("error", "unknown"))[:300]
            raise self._container.did_not_start(f"a step of its confinement failed: {error}")
        os.close(fds[0])
        try:
            self._take_worker(fds[1], inside=True)
        except GuestLost as exc:
            raise NoSockets(f"its processes cannot be seen from here ({exc})") from None
        if self.cpu_seconds() is None or (limits.memory_mb is not None and self.memory_headroom_mb() is None):
            raise NoSockets("its processes cannot be measured from here; /proc hides them")

    # ---- what `SupervisedGuest` leaves open

    def _supervisor_gone(self) -> GuestLost:
        """See `SupervisedGuest`."""
        return self._container.gone()

    def restart_clock(self, seconds: float | None) -> None:
        """See `Guest.restart_clock`."""
        self._container.check_age()
        self._order({"op": "clock", "seconds": None if seconds is None else seconds + SESSION_SLACK_SECONDS})

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


_connections: Final[weakref.WeakSet[socket.socket]] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child of the host: give up the child's copies, which would keep containers alive after the host."""
    for connection in list(_connections):
        fd = connection.detach()
        if fd >= 0:
            os.close(fd)


os.register_at_fork(after_in_child=_after_fork)
