"""The first process of a session's container: it becomes the supervisor, after it has forked the relay.

The container is the isolation, so there are no namespaces to make and no tree to build. The attached standard input and
output belong to the relay alone: the worker is forked by the supervisor, which has closed both. Standard error carries
what an operator should read when a container does not start.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import time
from typing import Final, NoReturn

from ..confine import _syscalls_unsafe as raw
from ..confine.steps import SessionConfinement, confine_in_container, confine_relay
from . import control, supervisor, worker
from .multiplex import HEADER, MESSAGE, STDERR, STDOUT, Multiplexer, StreamFailed
from .zygote import ARENAS, PRELOADED, own_sizes

__all__ = ("CONTEXTS", "main")

#: Where the host hard-links the contexts of this session; a read-only mount.
CONTEXTS: Final = "/ctx"
_CHUNK: Final = 1 << 16
#: Linux makes a process's CPU clock id from its pid: ~pid << 3 | CPUCLOCK_SCHED.
_CPUCLOCK_SCHED: Final = 2
_SIGNALS: Final = {"wake": signal.SIGCONT, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}


class _Attached:
    """The container's standard input and output."""

    read_fd = 0
    write_fd = 1

    def __init__(self) -> None:
        os.set_blocking(0, False)
        os.set_blocking(1, False)

    def read(self) -> bytes:
        data = os.read(0, _CHUNK)
        if not data:
            raise StreamFailed("the host is gone")
        return data

    def write(self, data: memoryview) -> int:
        return os.write(1, data)


class Relay(Multiplexer):
    """The container's end of the stream. It believes the host and the supervisor, and only carries what the worker sends."""

    def __init__(self, data: socket.socket, supervisor_socket: socket.socket, outputs: dict[int, int]) -> None:
        super().__init__(_Attached(), data, supervisor_socket, outputs, reads_outputs=True)
        self._supervisor = supervisor_socket
        self._worker = -1
        self._worker_pid = 0

    def on_remote(self, message: control.Message) -> None:
        """An order of the host: signals are sent from here, everything else goes to the supervisor."""
        op = message["op"]
        if op in _SIGNALS:
            if op == "wake":
                self.set_turn(int(message["turn"]))
            self._signal(_SIGNALS[op])
        elif op == "clock":
            self.send_clock()
        elif op == "measure":
            self.send_message({"op": "measured", **self._measure()})
        elif op in ("recover", "fresh"):
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                control.send(self._supervisor, message, (theirs.fileno(),))
            self.set_generation(mine, int(message["generation"]))
        else:
            control.send(self._supervisor, message)

    def on_local(self, message: control.Message, fds: list[int]) -> None:
        """A report of the supervisor; with one about a worker comes that worker's pidfd."""
        if "worker" in message and fds:
            self._worker_pid = int(message["worker"])
            if self._worker >= 0:
                os.close(self._worker)
            self._worker = fds.pop()
        for fd in fds:
            os.close(fd)
        self.send_message(message)

    def on_file(self, name: str) -> int:
        """A context the host has put beside the container."""
        if "/" in name or name.startswith("."):
            raise StreamFailed("a context has no such name")
        return os.open(f"{CONTEXTS}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def _signal(self, number: int) -> None:
        try:
            raw.pidfd_send_signal(self._worker, number)
        except ProcessLookupError:
            pass  # it died; the supervisor reports it

    def clock(self) -> float | None:
        """See `Multiplexer.clock`."""
        try:
            return time.clock_gettime((~self._worker_pid << 3) | _CPUCLOCK_SCHED)
        except OSError:
            return None

    def _measure(self) -> control.Message:
        """Peak memory of the worker and what it may still allocate, as the kernel counts them; what it does not tell is left out."""
        found: control.Message = {}
        try:
            with open(f"/proc/{self._worker_pid}/status") as file:
                sizes = {line.partition(":")[0]: line.split() for line in file}
            found["peak_kb"] = int(sizes["VmHWM"][1])
            with open(f"/proc/{self._worker_pid}/limits") as file:
                allowed = next(line.split()[3] for line in file if line.startswith("Max data size"))
            found["headroom_kb"] = int(allowed) // 1024 - int(sizes["VmData"][1])
        except (OSError, KeyError, ValueError, StopIteration):
            pass
        return found


def _settings() -> control.Message:
    """The host's first frame: what this session may use."""
    header = _read_exactly(HEADER.size)
    kind, _, _, length = HEADER.unpack(header)
    if kind != MESSAGE or not 0 < length <= control.MAX_MESSAGE:
        raise StreamFailed("the first frame is no message")
    return control.load(_read_exactly(length))


def _read_exactly(size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            raise StreamFailed("the host is gone")
        data += piece
    return data


def _run_relay(data: socket.socket, supervisor_socket: socket.socket, outputs: dict[int, int]) -> NoReturn:
    try:
        raw.close_all_except({0, 1, 2, data.fileno(), supervisor_socket.fileno(), *outputs.values()})
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        confine_relay()
        Relay(data, supervisor_socket, outputs).run()
    except (StreamFailed, OSError):
        pass  # the end of the host or of the supervisor is the end of the session
    finally:
        os._exit(0)


def main() -> int:
    """Be the session: does not return before it is over."""
    raw.limit_malloc_arenas(ARENAS)
    for name in PRELOADED:
        importlib.import_module(name)
    settings = _settings()
    worker.prepare()
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    base_data, base_address_space = own_sizes(proc)
    os.close(proc)
    plan = SessionConfinement(
        kernel_id=None,
        memory_mb=settings["memory_mb"],
        disk_mb=settings["disk_mb"],
        tasks=None,  # RLIMIT_NPROC counts a uid over all containers: the engine's pids limit does it
        base_data=base_data,
        base_address_space=base_address_space,
    )
    gc.collect()
    gc.freeze()
    data, data_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reports, reports_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    if os.fork() == 0:
        _run_relay(data, reports, {STDOUT: out_read, STDERR: err_read})
    fds = [data_theirs.detach(), reports_theirs.detach(), out_write, err_write]
    supervisor.main(lambda: confine_in_container(plan), set(), fds, settings["seconds"])
