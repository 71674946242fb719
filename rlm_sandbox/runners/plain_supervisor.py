"""The supervisor on a kernel without seccomp notifications, pidfds and subreapers: gVisor's.

What the ordinary supervisor decides call by call is decided by arguments here (`confine.seccomp`): a worker may signal
itself only, and fork only with a secret in a register, which the supervisor hands out on the host's word. A cell that
takes the runner apart can steal that secret; what it then forks is found in /proc and killed, at the end of each turn
and with its worker. So the standby is best effort here: such a cell can also pass off a process of its own as the standby.
The isolation does not rest on any of this: it is the container's.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from types import FrameType
from typing import Final

from ..confine import _syscalls_unsafe as raw
from ..confine.steps import confine_plain_worker, seal_worker
from ..wire import control
from .processes import ByPid, Process
from .supervisor import CANNOT, HELLO, LISTENER, Supervisor
from .worker import await_birth

__all__ = ("PlainSupervisor", "fork_standby")

_SECRET_BYTES: Final = 8
#: A sweep that has not come to an end by then is raced by a fork bomb: the container ends, which no process survives.
_SWEEP_SECONDS: Final = 2.0


def fork_standby(birth: socket.socket) -> int:
    """In the worker: fork with the secret that the supervisor has sent for this once, or is about to send."""
    await_birth(birth, select.POLLIN)
    return raw.fork_with(int.from_bytes(birth.recv(_SECRET_BYTES), "big"))


def _on_child(_number: int, _frame: FrameType | None) -> None:
    """SIGCHLD: what matters is the byte on the wake-up descriptor."""


class PlainSupervisor(Supervisor):
    """See the module. ``spared``: processes of ours that a sweep leaves alone."""

    def __init__(self, host: socket.socket, seconds: float | None, spared: frozenset[int]) -> None:
        super().__init__(host, seconds)
        self._spared = spared | {os.getpid()}
        self._secret = int.from_bytes(os.urandom(_SECRET_BYTES), "big")
        # Not a pipe: a worker could open that by /proc, and take the bytes.
        self._child_ended, self._wake = socket.socketpair()
        for end in (self._child_ended, self._wake):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _on_child)

    _fork = staticmethod(fork_standby)

    def _process(self, pid: int) -> Process:
        return ByPid(pid)

    def _take_confined(self, mine: socket.socket) -> None:
        if mine.recv(16) != LISTENER:
            raise OSError("the worker did not confine itself")

    def _confine_worker(self, birth: socket.socket) -> None:
        signal.set_wakeup_fd(-1)
        secret, self._secret = self._secret, 0
        confine_plain_worker(secret)
        birth.send(LISTENER)
        seal_worker()

    def _kill_worker(self, process: Process) -> None:
        try:
            process.signal(signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._sweep(set())

    def _sweep(self, living: set[int]) -> bool:
        """Kill every process of the container that is not ours, one of ``living``, or the standby. Whether there was one."""
        any_killed = False
        until = time.monotonic() + _SWEEP_SECONDS
        spared = self._spared | living | ({self._standby.pid} if self._standby else set())
        while True:
            if self._worker and self._worker.pid not in living:
                spared = spared | {self._worker.pid}  # killed already; it stays in /proc until it is waited for
            found = [pid for name in os.listdir("/proc") if name.isdigit() and (pid := int(name)) not in spared]
            left = False
            for pid in found:
                if not _is_zombie(pid):
                    left = any_killed = True
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
            if not left:
                return any_killed
            if time.monotonic() > until:
                os._exit(1)

    def on_stopped(self) -> None:
        """A child that a cell has forked goes at the end of its turn."""
        if self._worker and not self._ticket_until:
            self._sweep({self._worker.pid})

    def open_ticket(self) -> None:
        """See `Supervisor.open_ticket`; the worker gets the secret."""
        super().open_ticket()
        if self._ticket_until and self._birth is not None and self._worker:
            self._sweep({self._worker.pid})
            try:
                self._birth.send(self._secret.to_bytes(_SECRET_BYTES, "big"))
            except OSError:
                self._fail_ticket("the worker flooded its supervisor")

    def _end_ticket(self) -> None:
        """See `Supervisor._end_ticket`. A child that hangs was forked while a thread of a cell was in the C library: it is not the
        worker's doing, which goes on without it."""
        if self._worker and self._sweep({self._worker.pid}):
            self._leave_unprotected()
        else:
            super()._end_ticket()

    def _on_birth_word(self, sender: int, text: bytes) -> None:
        known = [process.pid for process in (self._worker, self._standby) if process]
        if text == HELLO and sender not in known and sender not in self._spared:
            self._accept_standby(ByPid(sender))
        elif text == CANNOT:
            super()._on_birth_word(sender, text)
            if self._worker and not self._ticket_until:
                self._sweep({self._worker.pid})  # what it has forked after all

    def _register_processes(self, poll: select.poll) -> None:
        if self._worker:  # else nobody takes what it has to say, and it would keep us awake until the host's next order
            poll.register(self._child_ended, select.POLLIN)

    def _worker_ended(self, process: Process, ready: set[int]) -> bool:
        if self._child_ended.fileno() not in ready:
            return False
        try:
            self._child_ended.recv(4096)
        except BlockingIOError:
            pass
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def report_ready(self) -> None:
        """See `Supervisor.report_ready`."""
        assert self._worker is not None
        control.send(self._host, {"op": "ready", "worker": self._worker.pid})


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return True  # it is gone
