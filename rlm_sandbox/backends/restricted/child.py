"""`PlainGuest`: a killable child of the host on any POSIX system: limits of the kernel's, a kill from outside, and nothing else.

For hosts without namespaces. What it says of files and the network it says by the policy alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from ... import bundle
from ...bridge import measured
from ...bridge.guest import Death, GuestLost, Recovery, Report
from ...context import Context, DataContext
from ...errors import BackendUnavailable
from ...limits import Limits
from ...results import Stream
from ...waiting import is_readable

__all__ = ("PlainGuest",)

_NAME: Final = "restricted"
_READY: Final = b"R"
#: From exec to a warm interpreter; about 0.15 s when idle.
_START_SECONDS: Final = 30.0
#: A child whose channel has ended is a zombie a moment later.
_REAP_SECONDS: Final = 2.0
#: Beyond session_seconds, which the host enforces, for a child whose host is gone.
_CPU_SLACK_SECONDS: Final = 5


class PlainGuest:
    """A guest in a plain child. See `Guest`; there is no supervisor and no standby, so a kill costs the variables."""

    maps_contexts = True
    stream = None

    def __init__(self, limits: Limits) -> None:
        """
        Raises:
            BackendUnavailable: it did not start, or this system does not enforce its limits.
        """
        self._limits = limits
        self._owner = os.getpid()
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._death: Death | None = None
        with contextlib.ExitStack() as on_error, contextlib.ExitStack() as theirs:
            try:
                self.data, data_theirs = _pair(on_error, theirs)
                self._leash, leash_theirs = _pair(on_error, theirs)
                (out_read, out_write), (err_read, err_write) = _pipe(on_error, theirs), _pipe(on_error, theirs)
                with _archive() as archive:
                    self._process = self._spawn(archive, data_theirs, leash_theirs, out_write, err_write)
                    on_error.callback(self._kill)
                    theirs.close()
                    self._await_ready(err_read)
            except (OSError, RuntimeError) as exc:  # RuntimeError: the host's interpreter is ending
                why = exc.strerror if isinstance(exc, OSError) else exc
                raise BackendUnavailable(
                    _NAME, f"a child process could not be started ({why})", "close sessions, or raise the limit: ulimit -n"
                ) from exc
            self.outputs: Mapping[int, Stream] = {out_read: "stdout", err_read: "stderr"}
            on_error.pop_all()

    def _spawn(self, archive: str, data: socket.socket, leash: socket.socket, out_fd: int, err_fd: int) -> subprocess.Popen[bytes]:
        seconds = self._limits.session_seconds
        memory = -1 if self._limits.memory_mb is None else self._limits.memory_mb
        cpu = -1 if seconds is None else math.ceil(seconds) + _CPU_SLACK_SECONDS
        fds = (data.fileno(), leash.fileno())
        return _starter.submit(
            subprocess.Popen,
            [
                os.path.realpath(sys.executable),
                "-I",
                "-S",
                "-X",
                "utf8",
                archive,
                "plain",
                *map(str, (*fds, os.getpid(), memory, cpu)),
            ],
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            stdin=subprocess.DEVNULL,
            stdout=out_fd,
            stderr=err_fd,
            pass_fds=fds,
            cwd="/",
            process_group=0,  # in the host's own session: the kernel ends a stopped group that has lost its parent
        ).result()

    def _await_ready(self, err_fd: int) -> None:
        said = self._leash.recv(1_000) if is_readable(self._leash.fileno(), _START_SECONDS) else b"it did not start in time"
        if said == _READY:
            return
        why = said.decode("utf-8", "replace")
        if not why:
            lines = os.read(err_fd, 16_384).decode("utf-8", "replace").strip().splitlines()
            why = lines[-1][:300] if lines else "it ended at its start"
        raise BackendUnavailable(_NAME, f"a plain child process cannot be confined here ({why})", "run: rlm-sandbox doctor")

    # ---- what became of it

    @property
    def control_fd(self) -> int:
        """The host's end of the leash: it ends with the child."""
        return self._leash.fileno()

    def restart_clock(self, seconds: float | None) -> None:
        """See `Guest.restart_clock`. A child that waits is stopped, and uses nothing of its processor time."""

    def report(self) -> Report | None:
        """See `Guest.report`. Whatever comes on the leash after the start, an end or a byte, ends the child."""
        if not is_readable(self._leash.fileno()):
            return None
        self._kill(_REAP_SECONDS)
        return Report("died", self._death or Death())

    def _kill(self, patience: float = 0.0) -> None:
        """End the child if it has not ended by itself, and keep what the kernel says of it."""
        if self._death is not None:
            return
        until = time.monotonic() + patience
        try:
            while not (found := os.wait4(self._process.pid, os.WNOHANG))[0] and time.monotonic() < until:
                time.sleep(0.001)
            why = ""
            if not found[0]:
                why = "it closed its channel" if patience else ""
                os.kill(self._process.pid, signal.SIGKILL)
                found = os.wait4(self._process.pid, 0)
        except ChildProcessError:  # the host reaps children by itself
            self._process.returncode, self._death = -signal.SIGKILL, Death()
            return
        _, status, usage = found
        self._process.returncode = os.waitstatus_to_exitcode(status)
        unit = 1 if sys.platform == "darwin" else 1024
        self._death = Death(status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / (1024 * 1024), why)

    def recover(self, *, fresh: bool) -> Recovery:
        """See `Guest.recover`: always an empty one."""
        self._kill()
        death = self._death or Death()
        self._free()
        try:
            self._start()
        except BackendUnavailable as exc:
            raise GuestLost(exc.reason) from exc
        return Recovery("fresh", death)

    def request_protection(self) -> None:
        """See `Guest.request_protection`. Never asked for: sessions of this guest have no recovery."""
        raise GuestLost("a plain child has no standby")

    # ---- signals and measurements

    def _signal(self, number: int) -> None:
        if self._death is None:  # not reaped, so the pid is still its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def wake(self) -> None:
        """See `Guest.wake`."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """See `Guest.stop`."""
        self._signal(signal.SIGSTOP)

    def interrupt(self) -> None:
        """See `Guest.interrupt`."""
        self._signal(signal.SIGINT)

    def cpu_seconds(self) -> float | None:
        """See `Guest.cpu_seconds`."""
        if sys.platform != "linux" or self._death is not None:
            return None
        return measured.cpu_seconds(self._process.pid)

    def peak_memory_mb(self) -> float | None:
        """See `Guest.peak_memory_mb`."""
        return measured.peak_memory_mb(self._process.pid)

    def memory_headroom_mb(self) -> float | None:
        """See `Guest.memory_headroom_mb`. Without a standby there is nothing to go back to, whatever is left."""
        return None

    def grow_address_space(self, size: int) -> None:
        """See `Guest.grow_address_space`. Limits cannot be raised from here; there is room for a mapped gigabyte from the start."""

    def open_context(self, context: Context | DataContext) -> int:
        """See `Guest.open_context`."""
        return os.open(f"/proc/self/fd/{context.memory_file().fd}", os.O_RDONLY | os.O_CLOEXEC)

    # ---- the end

    def _free(self) -> None:
        self.data.close()
        self._leash.close()
        for fd in self.outputs:
            os.close(fd)
        self.outputs = {}

    def close(self) -> None:
        """See `Guest.close`."""
        if self._closed:
            return
        self._closed = True
        if self._owner == os.getpid():  # in a forked child of the host the guest is still the parent's
            self._kill()
        self._free()


#: Children are started on a thread that stays as long as the host does: to Linux that thread is the parent a child dies with.
_starter = ThreadPoolExecutor(1, "rlm-sandbox-starter")


def _after_fork() -> None:
    """In a forked child of the host that thread is not there."""
    global _starter
    _starter = ThreadPoolExecutor(1, "rlm-sandbox-starter")


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _archive() -> Iterator[str]:
    """The guest's files, where the child can read them until it has: it imports everything before it gives up its rights."""
    with tempfile.NamedTemporaryFile(prefix="rlm-guest-") as file:
        file.write(bundle.guest_archive())
        file.flush()
        yield file.name


def _pair(on_error: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    on_error.callback(mine.close)
    theirs.callback(other.close)
    mine.setblocking(False)
    return mine, other


def _pipe(on_error: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    read_fd, write_fd = os.pipe()
    on_error.callback(os.close, read_fd)
    theirs.callback(os.close, write_fd)
    os.set_blocking(read_fd, False)
    return read_fd, write_fd
