"""`JailGuest`: one session's supervisor and worker, seen from the host: signals by pidfd, orders by the control socket."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from ...bridge import measured
from ...bridge.guest import Death, GuestLost, Recovery, Report
from ...context import Context, DataContext
from ...errors import BackendUnavailable, InputRefused
from ...options import JailOptions
from ...registry import SessionConfig
from ...results import Stream
from ...runners import control
from ...waiting import is_readable
from .cgroups import REMEDY, SessionGroup
from .channels import channels, check_descriptors, pipes
from .inputs import input_mounts

__all__ = ("JailGuest",)

#: The host ends a session at ``session_seconds``; a supervisor whose host did not come back for it ends itself.
_SESSION_SLACK_SECONDS: Final = 60.0
#: So it need not know to the second when a session that waited in a pool began: that would cost an order at each start.
_CLOCK_SLACK_SECONDS: Final = 45.0
_START_SECONDS: Final = 10.0
#: Waking a standby or forking a worker takes about 1.5 ms, with 1 GB of small objects about 60 ms.
_RECOVER_SECONDS: Final = 5.0
#: Descriptors that a copy of a session needs in all, its own channels and the new ones of the original.
_FOR_A_COPY: Final = 24
#: What a supervisor says instead of doing what it was told.
_REFUSALS: Final = ("refused", "gone")
#: Field of /proc/PID/statm that counts data and stack, in pages; what RLIMIT_DATA bounds is at most that.
_STATM_DATA: Final = 5
_TICKET: Final = control.dump({"op": "ticket"})
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def _host_pid(pidfd: int) -> int:
    """The pid, in the host's namespace, of the process behind a pidfd."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            if pid > 0:  # else it is gone, or in another namespace, and the kernel would take the number for ourselves
                return pid
    raise GuestLost("a pidfd has no pid")


class _Refused(Exception):
    """The supervisor did not do it; nothing has changed."""


class _Spawner(Protocol):
    """What brings a worker to life: a zygote, or the supervisor of the session that is copied."""

    def spawn(self, settings: dict[str, Any], fds: tuple[int, ...]) -> None: ...

    def count(self, change: int) -> None: ...


class _Family:
    """How many guests one supervisor has. Thread-safe: copies of a session are used and closed apart."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def join(self) -> None:
        """One more."""
        with self._lock:
            self._count += 1

    def leave(self) -> bool:
        """One less. True for the last."""
        with self._lock:
            self._count -= 1
            return self._count == 0


class JailGuest:
    """A guest in the jail. Not thread-safe: its session is."""

    maps_contexts = True
    stream = None

    def __init__(self, zygote: _Spawner, config: SessionConfig, family: _Family | None = None) -> None:
        limits = config.limits
        self._config = config
        self._closed = False
        self._family = family or _Family()
        self._owner = os.getpid()
        self._zygote = zygote
        self._generation = 1
        self._supervisor = self._worker = self._statm = -1
        self._worker_pid = 0
        self._clock_at = time.monotonic()
        self._data_limit: int | None = None
        self._ran_out = False
        cpus = config.options.cpus if isinstance(config.options, JailOptions) else None
        # First, because it looks whether this process has the descriptors for all that follows.
        sockets, (out_read, out_write, err_read, err_write) = channels()
        try:
            self._group = SessionGroup(limits, recovery=config.recovery, cpus=cpus)
        except BaseException:
            for sock in sockets:
                sock.close()
            for fd in (out_read, out_write, err_read, err_write):
                os.close(fd)
            raise
        zygote.count(1)
        #: Whether the supervisor puts the workers it starts into the group.
        self._enters = False
        self.data, data_theirs, self._control, control_theirs = sockets
        self.outputs: Mapping[int, Stream] = {out_read: "stdout", err_read: "stderr"}
        try:
            settings = {
                "memory_mb": limits.memory_mb,
                "disk_mb": limits.disk_mb,
                "tasks": limits.processes,
                "seconds": None if limits.session_seconds is None else limits.session_seconds + _SESSION_SLACK_SECONDS,
            }
            theirs = (data_theirs.fileno(), control_theirs.fileno(), out_write, err_write)
            with input_mounts(config.files) as (inputs, mounts), self._entrances(family) as entrances:
                zygote.spawn({**settings, "inputs": inputs}, (*theirs, *mounts, *entrances))
                self._enters = bool(entrances)
            self.data.setblocking(False)
            self._control.setblocking(False)
            for fd in self.outputs:
                os.set_blocking(fd, False)
            message, fds = self._receive(_START_SECONDS)
            if "input" in message:
                remedy = "make it readable for the sandbox: on a root host a session runs as an id of its own (chmod o+r)"
                raise InputRefused(str(message["input"]), f"it cannot be read there ({message['error']})", remedy)
            if message["op"] != "ready" or len(fds) != 2:
                raise BackendUnavailable(
                    "jail", f"the kernel refused a step ({message.get('error', 'unknown')})", "run: rlm-sandbox doctor"
                )
            self._supervisor = fds[0]
            self._family.join()
            self._take_worker(fds[1], inside=self._enters)
        except GuestLost as exc:
            self.close()
            raise BackendUnavailable("jail", f"a session did not start ({exc})", "run: rlm-sandbox doctor") from None
        except BaseException:
            self.close()
            raise
        finally:
            data_theirs.close()
            control_theirs.close()
            os.close(out_write)
            os.close(err_write)

    def _let_go(self) -> None:
        """Close what names the present worker."""
        for fd in (self._worker, self._statm):
            if fd >= 0:
                os.close(fd)
        self._worker = self._statm = -1

    @contextmanager
    def _entrances(self, family: _Family | None) -> Iterator[list[int]]:
        """Those of the group, for a supervisor of its own; a copy's worker is another supervisor's, of another group."""
        try:
            opened = [] if family is not None else self._group.entrances()
        except OSError as exc:
            raise BackendUnavailable("jail", f"the cgroup of a session cannot be used ({exc.strerror})", REMEDY) from exc
        try:
            yield opened
        finally:
            for fd in opened:
                os.close(fd)

    def _take_worker(self, pidfd: int, *, inside: bool) -> None:
        """``inside``: it is in the group, where it put itself before it was a worker, or was born."""
        self._let_go()
        self._worker = pidfd
        self._worker_pid = _host_pid(pidfd)
        if inside:
            return
        try:
            self._group.add(self._worker_pid)
        except OSError as exc:
            raise GuestLost(f"a worker cannot be put into its cgroup ({exc.strerror})") from None

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
            raise GuestLost("the supervisor is gone")
        return got

    def _order(self, message: control.Message, fds: tuple[int, ...] = ()) -> None:
        try:
            control.send(self._control, message, fds)
        except OSError as exc:
            raise GuestLost(f"the supervisor is gone ({exc.strerror})") from None

    def restart_clock(self, seconds: float | None) -> None:
        """See `Guest.restart_clock`."""
        now = time.monotonic()
        if now - self._clock_at > _CLOCK_SLACK_SECONDS:
            self._order({"op": "clock", "seconds": None if seconds is None else seconds + _SESSION_SLACK_SECONDS})
            self._clock_at = now

    def report(self) -> Report | None:
        """See `Guest.report`."""
        try:
            message, fds = self._received()
        except BlockingIOError:
            return None
        for fd in fds:
            os.close(fd)
        return self._as_report(message)

    def _as_report(self, message: control.Message) -> Report | None:
        if message["op"] == "died":
            return Report("died", self._death(message))
        if message["op"] == "protected":
            return Report("protected")
        if message["op"] == "unprotected":
            return Report("unprotected")
        if message["op"] == "standby_died":
            return Report("standby_died")
        return None

    def request_protection(self) -> None:
        """See `Guest.request_protection`."""
        try:
            self._control.send(_TICKET)
        except OSError as exc:
            raise GuestLost(f"the supervisor is gone ({exc.strerror})") from None

    def drop_standby(self) -> None:
        """See `CopyingGuest.drop_standby`."""
        self._order({"op": "drop"})

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
            self._order({**order, "generation": self._generation}, (theirs.fileno(), *outputs))
            message, fds = self._answer("recovered", 1, _RECOVER_SECONDS)
        except _Refused:
            mine.close()
            return None
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
        self.data.close()
        self.data = mine
        restored = message.get("state") == "restored"
        self._take_worker(fds[0], inside=restored or self._enters)
        return Recovery("restored" if restored else "fresh", self._death(message))

    def _answer(self, op: str, count: int, seconds: float) -> tuple[control.Message, list[int]]:
        """The supervisor's answer to an order, with ``count`` descriptors. Reports that crossed the order are dropped."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            message, fds = self._receive(left)
            if message["op"] == op and len(fds) == count:
                return message, fds
            if message["op"] in _REFUSALS and not fds:
                raise _Refused(message["op"])
            for fd in fds:
                os.close(fd)
            if message["op"] == "died" and op != "recovered":
                raise GuestLost("the worker died")
        raise GuestLost("the supervisor did not answer in time")

    # ---- copies

    def branch(self) -> JailGuest:
        """See `CopyingGuest.branch`."""
        try:
            return JailGuest(_BranchOf(self), replace(self._config, files={}), self._family)  # its inputs are there already
        except (BackendUnavailable, _Refused) as exc:
            raise GuestLost(f"there is no room for a copy ({exc})") from None

    def check_descriptors(self) -> None:
        """See `CopyingGuest.check_descriptors`."""
        check_descriptors(_FOR_A_COPY)

    def keep(self, key: int) -> None:
        """See `CopyingGuest.keep`."""
        self._order({"op": "keep", "key": key})
        try:
            self._answer("kept", 0, _RECOVER_SECONDS)
        except _Refused:
            raise GuestLost("the supervisor has nothing to keep, or no room for it") from None

    def forget(self, key: int) -> None:
        """See `CopyingGuest.forget`."""
        self._order({"op": "forget", "key": key})

    def take_over(self, key: int | None) -> Recovery | None:
        """See `CopyingGuest.take_over`. Whoever holds the old outputs writes to nobody."""
        try:
            out_read, out_write, err_read, err_write = pipes(2)
        except OSError as exc:
            raise GuestLost(f"there are no pipes for its output ({exc.strerror})") from exc
        kept: tuple[int, ...] = (out_read, err_read)
        try:
            for fd in kept:
                os.set_blocking(fd, False)
            order: control.Message = {"op": "recover"} if key is None else {"op": "recover", "key": key}
            recovery = self._replaced(order, (out_write, err_write))
            if recovery is not None:
                kept, self.outputs = tuple(self.outputs), {out_read: "stdout", err_read: "stderr"}
        finally:
            for fd in (*kept, out_write, err_write):
                os.close(fd)
        return recovery

    def _death(self, message: control.Message) -> Death:
        status, cpu, peak = message.get("status"), message.get("cpu"), message.get("maxrss_kb")
        self._ran_out = self._group.ran_out() or self._ran_out
        group_peak = self._group.peak_mb() if self._ran_out else None
        own_peak = peak / 1024 if type(peak) is int and 0 <= peak < 1 << 50 else None
        return Death(
            status=status if type(status) is int and 0 <= status < 1 << 16 else None,
            cpu_seconds=float(cpu) if isinstance(cpu, int | float) and 0 <= cpu < 1e9 else None,
            peak_memory_mb=own_peak if group_peak is None else group_peak,
            why=str(message.get("why", ""))[:200],
            out_of_memory=self._ran_out and status == signal.SIGKILL,
        )

    # ---- signals and measurements

    def _signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._worker, number)
        except ProcessLookupError:
            pass  # it died; the supervisor reports it

    def wake(self) -> None:
        """See `Guest.wake`."""
        self._ran_out = False
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """See `Guest.stop`."""
        self._signal(signal.SIGSTOP)

    def interrupt(self) -> None:
        """See `Guest.interrupt`."""
        self._signal(signal.SIGINT)

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
                self._statm = os.open(f"/proc/{self._worker_pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
            pages = int(os.pread(self._statm, 256, 0).split()[_STATM_DATA])
        except (OSError, StopIteration, IndexError, ValueError):
            return None
        return (self._data_limit - pages * _PAGE) / (1024 * 1024) if self._data_limit else None

    def grow_address_space(self, size: int) -> None:
        """See `Guest.grow_address_space`. The supervisor moves the soft limit: a worker may not set limits."""
        self._order({"op": "grow", "bytes": size})
        self._answer("grown", 0, _START_SECONDS)

    def open_context(self, context: Context | DataContext) -> int:
        """See `Guest.open_context`. A description of the session's own: the host's has an offset, which sessions would share."""
        return os.open(f"/proc/self/fd/{context.memory_file().fd}", os.O_RDONLY | os.O_CLOEXEC)

    # ---- the end

    def close(self) -> None:
        """See `Guest.close`. Killing the supervisor, pid 1 of its namespace, ends every process of the session."""
        if self._closed:
            return
        self._closed = True
        self._zygote.count(-1)
        # In a forked child of the host the guest is still the parent's.
        if self._supervisor >= 0 and self._owner == os.getpid():
            # The last one of those copied from one another; for another one the supervisor sees the end of its socket.
            target = self._supervisor if self._family.leave() else self._worker
            try:
                signal.pidfd_send_signal(target, signal.SIGKILL)
                is_readable(target, 2.0)
            except OSError:
                pass
        self.data.close()
        self._control.close()
        for fd in (*self.outputs, self._supervisor, self._worker, self._statm):
            if fd >= 0:
                os.close(fd)
        self._supervisor = self._worker = self._statm = -1
        if self._owner == os.getpid():
            self._group.close()  # last: of a copy, the supervisor ends the standby when it sees the socket's end


class _BranchOf:
    """The supervisor of ``guest``, which makes a session of its standby."""

    def __init__(self, guest: JailGuest) -> None:
        self._guest = guest

    def spawn(self, settings: dict[str, Any], fds: tuple[int, ...]) -> None:
        """See `_Spawner`."""
        self._guest._order({"op": "branch", "seconds": settings["seconds"]}, fds)
        self._guest._answer("branched", 0, _RECOVER_SECONDS)

    def count(self, change: int) -> None:
        """See `Zygote.count`: a copy is a session of the same zygote."""
        self._guest._zygote.count(change)
