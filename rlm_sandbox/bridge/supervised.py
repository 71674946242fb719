"""`SupervisedGuest`: the host's end of a session whose worker and supervisor each have a socket of their own to it.

What every such guest shares, whoever brought the two to life: orders and reports on the control socket, a new data channel
for each worker, and what the kernel tells of the worker by its pidfd.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..context import Context, DataContext
from ..results import Stream
from ..waiting import is_readable
from ..wire import control
from . import measured
from .guest import Death, GuestLost, Recovery, Report

__all__ = ("Refused", "SupervisedGuest", "death_of", "report_of")

#: What a supervisor says instead of doing what it was told.
_REFUSALS: Final = ("refused", "gone")
#: Field of /proc/PID/statm that counts data and stack, in pages; what RLIMIT_DATA bounds is at most that.
_STATM_DATA: Final = 5
_TICKET: Final = control.dump({"op": "ticket"})
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def _host_pid(pidfd: int) -> int:
    """The pid, in the host's namespace, of the process behind a pidfd. Raises `GuestLost` if it cannot be told."""
    try:
        lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    except OSError as exc:
        raise GuestLost(f"a pidfd cannot be looked at ({exc.strerror})") from exc
    for line in lines:
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            if pid > 0:  # else it is gone, or in another namespace, and the kernel would take the number for ourselves
                return pid
    raise GuestLost("a pidfd has no pid")


def death_of(message: control.Message) -> Death:
    """What a supervisor's report says of a worker's end, checked."""
    status, cpu, peak = message.get("status"), message.get("cpu"), message.get("maxrss_kb")
    return Death(
        status=status if type(status) is int and 0 <= status < 1 << 16 else None,
        cpu_seconds=float(cpu) if isinstance(cpu, int | float) and 0 <= cpu < 1e9 else None,
        peak_memory_mb=peak / 1024 if type(peak) is int and 0 <= peak < 1 << 50 else None,
        why=str(message.get("why", ""))[:200],
        out_of_memory=message.get("oom") is True,
    )


def report_of(message: control.Message, death: Callable[[control.Message], Death]) -> Report | None:
    """A supervisor's message as a report, None if it is none. ``death``: what a worker's end is made of."""
    op = message["op"]
    if op == "died":
        return Report("died", death(message))
    if op in ("protected", "unprotected", "standby_died"):
        return Report(op)
    return None


class Refused(Exception):
    """The supervisor did not do it; nothing has changed."""


class SupervisedGuest:
    """Those parts of a `Guest`. Not thread-safe: its session is. A subclass starts it, and ends it all."""

    maps_contexts = True
    stream = None

    #: Waking a standby or forking a worker takes about 1.5 ms, with 1 GB of small objects about 60 ms.
    recover_seconds = 5.0
    answer_seconds = 10.0

    def __init__(self, data: socket.socket, control_socket: socket.socket, outputs: Mapping[int, Stream]) -> None:
        """
        Args:
            data: the host's end of the first worker's data channel.
            control_socket: the host's end of the supervisor's.
            outputs: the reading ends of the pipes for what workers print.
        """
        self.data = data
        self.outputs: Mapping[int, Stream] = outputs
        self._control = control_socket
        self._generation = 1
        self._worker = self._statm = -1
        self._worker_pid = 0
        self._data_limit: int | None = None
        data.setblocking(False)
        control_socket.setblocking(False)
        for fd in outputs:
            os.set_blocking(fd, False)

    # ---- what subclasses add

    def _worker_taken(self, *, inside: bool) -> None:
        """There is another worker. ``inside``: it was born where the one before it was, or was told to go there."""

    def _starts_inside(self) -> bool:
        """Whether that holds for fresh workers, too."""
        return True

    def _death(self, message: control.Message) -> Death:
        """What is known of a worker's end."""
        return death_of(message)

    def _supervisor_gone(self) -> GuestLost:
        """What is known of the end of the control socket."""
        return GuestLost("the supervisor is gone")

    # ---- the worker

    def _take_worker(self, pidfd: int, *, inside: bool) -> None:
        self._let_go()
        self._worker = pidfd
        self._worker_pid = _host_pid(pidfd)
        # Now, although some sessions never look: its descriptor is one that a recovery has when there is no other left.
        self._open_statm()
        self._worker_taken(inside=inside)

    def _open_statm(self) -> None:
        with suppress(OSError):  # it is gone already, which is reported, or there is no descriptor left
            self._statm = os.open(f"/proc/{self._worker_pid}/statm", os.O_RDONLY | os.O_CLOEXEC)

    def _let_go(self) -> None:
        """Close what names the present worker."""
        fds = self._worker, self._statm
        self._worker = self._statm = -1  # first: a signal's handler may raise in between
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _close_channels(self) -> None:
        """Close everything that leads to the guest. Idempotent."""
        self.data.close()
        self._control.close()
        self._let_go()
        outputs, self.outputs = self.outputs, {}
        for fd in outputs:
            os.close(fd)

    # ---- control

    @property
    def control_fd(self) -> int:
        """The supervisor's socket."""
        return self._control.fileno()

    def _receive(self, seconds: float) -> tuple[control.Message, list[int]]:
        if not is_readable(self._control.fileno(), seconds):
            raise GuestLost("the supervisor did not answer in time")
        return self._received()

    def _received(self) -> tuple[control.Message, list[int]]:
        try:
            got = control.receive(self._control)
        except BlockingIOError:
            raise
        except (OSError, ValueError) as exc:
            raise GuestLost(f"the supervisor's channel failed: {exc}") from None
        if got is None:
            raise self._supervisor_gone()
        return got

    def _order(self, message: control.Message, fds: tuple[int, ...] = ()) -> None:
        try:
            control.send(self._control, message, fds)
        except OSError as exc:
            raise GuestLost(f"the supervisor is gone ({exc.strerror})") from None

    def _answer(self, op: str, count: int, seconds: float, generation: int | None = None) -> tuple[control.Message, list[int]]:
        """The supervisor's answer to an order, with ``count`` descriptors. Reports that crossed the order are dropped.

        ``generation``: of the worker that was asked for. An answer about another is that to an order whose caller was interrupted.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            message, fds = self._receive(left)
            if message["op"] == op and len(fds) == count and message.get("generation") == generation:
                return message, fds
            if message["op"] in _REFUSALS and not fds:
                raise Refused(message["op"])
            for fd in fds:
                os.close(fd)
            if message["op"] == "died" and op != "recovered":
                raise GuestLost("the worker died")
        raise GuestLost("the supervisor did not answer in time")

    def report(self) -> Report | None:
        """See `Guest.report`."""
        try:
            message, fds = self._received()
        except BlockingIOError:
            return None
        for fd in fds:
            os.close(fd)
        return report_of(message, self._death)

    def request_protection(self) -> None:
        """See `Guest.request_protection`."""
        try:
            self._control.send(_TICKET)
        except OSError as exc:
            raise GuestLost(f"the supervisor is gone ({exc.strerror})") from None

    def recover(self, *, fresh: bool) -> Recovery:
        """See `Guest.recover`."""
        # What belongs to the worker that is given up goes first: a host without a descriptor left can still recover.
        self.data.close()
        self._let_go()
        recovery = self._replaced({"op": "fresh" if fresh else "recover"}, ())
        if recovery is None:
            raise GuestLost("the supervisor has lost its way")
        return recovery

    def _replaced(self, order: control.Message, outputs: tuple[int, ...]) -> Recovery | None:
        """Another worker by ``order``, with a new data channel; None if there is none to be had and nothing has changed."""
        self._generation += 1
        try:
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as exc:
            raise GuestLost(f"there is no channel for a new worker ({exc.strerror})") from exc
        mine.setblocking(False)
        try:
            try:
                self._order({**order, "generation": self._generation}, (theirs.fileno(), *outputs))
            finally:
                theirs.close()  # now: the answer brings a descriptor, and there may be none left
            message, fds = self._answer("recovered", 1, self.recover_seconds, self._generation)
        except Refused:
            mine.close()
            return None
        except BaseException:
            mine.close()
            raise
        self.data.close()
        self.data = mine
        restored = message.get("state") == "restored"
        self._take_worker(fds[0], inside=restored or self._starts_inside())
        return Recovery("restored" if restored else "fresh", self._death(message))

    # ---- signals

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._worker, number)
        except ProcessLookupError:
            pass  # it died; the supervisor reports it

    def wake(self) -> None:
        """See `Guest.wake`."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """See `Guest.stop`."""
        self._signal(signal.SIGSTOP)

    def interrupt(self) -> None:
        """See `Guest.interrupt`."""
        self._signal(signal.SIGINT)

    # ---- measurements

    def cpu_seconds(self) -> float | None:
        """See `Guest.cpu_seconds`."""
        return measured.cpu_seconds(self._worker_pid)

    def peak_memory_mb(self) -> float | None:
        """See `Guest.peak_memory_mb`."""
        return measured.peak_memory_mb(self._worker_pid)

    def memory_headroom_mb(self) -> float | None:
        """See `Guest.memory_headroom_mb`."""
        try:
            if self._data_limit is None:  # the same for every worker of the session
                limits = Path(f"/proc/{self._worker_pid}/limits").read_text()
                value = next(line.split()[3] for line in limits.splitlines() if line.startswith("Max data size"))
                self._data_limit = int(value) if value.isdigit() else 0
            if self._statm < 0:
                self._open_statm()
            pages = int(os.pread(self._statm, 256, 0).split()[_STATM_DATA])
        except (OSError, StopIteration, IndexError, ValueError):
            return None
        return (self._data_limit - pages * _PAGE) / (1024 * 1024) if self._data_limit else None

    def grow_address_space(self, size: int) -> None:
        """See `Guest.grow_address_space`. The supervisor moves the soft limit: a worker may not set limits."""
        self._order({"op": "grow", "bytes": size})
        self._answer("grown", 0, self.answer_seconds)

    def open_context(self, context: Context | DataContext) -> int:
        """See `Guest.open_context`. A description of the session's own: the host's has an offset, which sessions would share."""
        stored = context.memory_file().fd
        # A worker that kept the descriptor could open it again: not to write its times, nor to lock it for others.
        os.fchmod(stored, 0o444)
        return os.open(f"/proc/self/fd/{stored}", os.O_RDONLY | os.O_CLOEXEC)
