"""`JailGuest`: one session's supervisor and worker, seen from the host: signals by pidfd, orders by the control socket."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Protocol

from ...bridge.guest import Death, GuestLost, Recovery
from ...bridge.supervised import Refused, SupervisedGuest, death_of
from ...errors import BackendUnavailable, InputRefused
from ...options import JailOptions
from ...registry import SessionConfig
from ...waiting import is_readable
from ...wire import control
from .cgroups import REMEDY, SessionGroup
from .channels import channels, check_descriptors, pipes
from .inputs import input_mounts

__all__ = ("JailGuest",)

#: The host ends a session at ``session_seconds``; a supervisor whose host did not come back for it ends itself.
_SESSION_SLACK_SECONDS: Final = 60.0
#: So it need not know to the second when a session that waited in a pool began: that would cost an order at each start.
_CLOCK_SLACK_SECONDS: Final = 45.0
_START_SECONDS: Final = 10.0
#: Descriptors that a copy of a session needs in all, its own channels and the new ones of the original.
_FOR_A_COPY: Final = 24


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


class JailGuest(SupervisedGuest):
    """A guest in the jail. Not thread-safe: its session is."""

    def __init__(self, zygote: _Spawner, config: SessionConfig, family: _Family | None = None) -> None:
        limits = config.limits
        self._config = config
        self._closed = False
        self._family = family or _Family()
        self._owner = os.getpid()
        self._zygote = zygote
        self._supervisor = -1
        self._clock_at = time.monotonic()
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
        data, data_theirs, mine, control_theirs = sockets
        super().__init__(data, mine, {out_read: "stdout", err_read: "stderr"})
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

    def _worker_taken(self, *, inside: bool) -> None:
        """See `SupervisedGuest`: into the group with it, where it did not put itself before it was a worker, or was born."""
        if inside:
            return
        try:
            self._group.add(self._worker_pid)
        except OSError as exc:
            raise GuestLost(f"a worker cannot be put into its cgroup ({exc.strerror})") from None

    def _starts_inside(self) -> bool:
        """See `SupervisedGuest`."""
        return self._enters

    # ---- control

    def restart_clock(self, seconds: float | None) -> None:
        """See `Guest.restart_clock`."""
        now = time.monotonic()
        if now - self._clock_at > _CLOCK_SLACK_SECONDS:
            self._order({"op": "clock", "seconds": None if seconds is None else seconds + _SESSION_SLACK_SECONDS})
            self._clock_at = now

    def drop_standby(self) -> None:
        """See `CopyingGuest.drop_standby`."""
        self._order({"op": "drop"})

    # ---- copies

    def branch(self) -> JailGuest:
        """See `CopyingGuest.branch`."""
        try:
            return JailGuest(_BranchOf(self), replace(self._config, files={}), self._family)  # its inputs are there already
        except (BackendUnavailable, Refused) as exc:
            raise GuestLost(f"there is no room for a copy ({exc})") from None

    def check_descriptors(self) -> None:
        """See `CopyingGuest.check_descriptors`."""
        check_descriptors(_FOR_A_COPY)

    def keep(self, key: int) -> None:
        """See `CopyingGuest.keep`."""
        self._order({"op": "keep", "key": key})
        try:
            self._answer("kept", 0, self.recover_seconds)
        except Refused:
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
        """See `SupervisedGuest`. The group knows what the kernel killed for its memory."""
        death = death_of(message)
        self._ran_out = self._group.ran_out() or self._ran_out
        group_peak = self._group.peak_mb() if self._ran_out else None
        return replace(
            death,
            peak_memory_mb=death.peak_memory_mb if group_peak is None else group_peak,
            out_of_memory=self._ran_out and death.status == signal.SIGKILL,
        )

    def wake(self) -> None:
        """See `Guest.wake`."""
        self._ran_out = False
        super().wake()

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
        self._close_channels()
        if self._supervisor >= 0:
            os.close(self._supervisor)
            self._supervisor = -1
        if self._owner == os.getpid():
            self._group.close()  # last: of a copy, the supervisor ends the standby when it sees the socket's end


class _BranchOf:
    """The supervisor of ``guest``, which makes a session of its standby."""

    def __init__(self, guest: JailGuest) -> None:
        self._guest = guest

    def spawn(self, settings: dict[str, Any], fds: tuple[int, ...]) -> None:
        """See `_Spawner`."""
        self._guest._order({"op": "branch", "seconds": settings["seconds"]}, fds)
        self._guest._answer("branched", 0, self._guest.recover_seconds)

    def count(self, change: int) -> None:
        """See `Zygote.count`: a copy is a session of the same zygote."""
        self._guest._zygote.count(change)
