"""The first process of a session's container: it becomes the supervisor.

The container is the isolation, so there are no namespaces to make and no tree to build. There are two ways to the host. With
``sockets`` the process connects to one of the host's, which hands over the channels of a session. Else it forks the relay, to which
alone the attached standard input and output belong: the worker is forked by the supervisor, which has closed both. Standard error
carries what an operator should read when a container does not start.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
from typing import Final, NoReturn

from ..confine import _syscalls_unsafe as raw
from ..confine.steps import SessionConfinement, confine_in_container, confine_in_plain_container, confine_relay
from ..wire import control
from ..wire.frames import ends_turn
from . import supervisor, worker
from .framing import HEADER, INTERRUPT, MEASURE, MESSAGE, STDERR, STDOUT, STOP, WAKE, StreamFailed
from .multiplex import Multiplexer
from .plain_supervisor import PlainSupervisor
from .preloaded import PRELOADED
from .processes import ByPid, ByPidfd, Process
from .zygote import ARENAS, own_sizes

__all__ = ("CANNOT_CONNECT", "CONTEXTS", "HOST_SOCKET", "check", "main", "preload")

#: Where the host puts its socket, or hard-links the contexts of this session; a read-only mount.
CONTEXTS: Final = "/ctx"
#: What a container says that cannot, whoever is to blame: the host takes the other way.
CANNOT_CONNECT: Final = "it cannot connect to its host"
_SETTINGS_SECONDS: Final = 30.0
#: The worker's, and two for what it prints.
_CHANNELS: Final = 3
#: There, for a session that is to connect: the host's socket, until it has.
HOST_SOCKET: Final = "host"
#: Where the image has the packages of its variant, and which of them are loaded before the first session.
PACKAGES: Final = "/usr/lib/rlm_packages"
_VARIANT_PACKAGES: Final = ("numpy", "pandas")
_CHUNK: Final = 1 << 16
#: Linux makes a process's CPU clock id from its pid: ~pid << 3 | CPUCLOCK_SCHED.
_CPUCLOCK_SCHED: Final = 2
#: Field of /proc/PID/statm that counts data and stack, in pages; what RLIMIT_DATA bounds is at most that.
_STATM_DATA: Final = 5
_STATM_SIZE: Final = 0
_PAGE_KB: Final = os.sysconf("SC_PAGE_SIZE") // 1024
#: Where control groups of version 2 and 1 count what the kernel killed for the container's memory limit.
_MEMORY_KILLS: Final = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
_SIGNALS: Final = {WAKE: signal.SIGCONT, STOP: signal.SIGSTOP, INTERRUPT: signal.SIGINT}
#: What a host that speaks by sockets may have the supervisor send to the worker.
_ORDERED_SIGNALS: Final = frozenset(map(int, _SIGNALS.values()))


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

    def write(self, data: bytes | memoryview) -> int:
        return os.write(1, data)


class Relay(Multiplexer):
    """The container's end of the stream. It believes the host and the supervisor, and only carries what the worker sends."""

    def __init__(
        self, data: socket.socket, supervisor_socket: socket.socket, outputs: dict[int, int], data_limit_kb: int | None
    ) -> None:
        super().__init__(_Attached(), data, supervisor_socket, outputs)
        self._supervisor = supervisor_socket
        self._data_limit_kb = data_limit_kb
        self._worker: Process | None = None
        self._stopped = False
        self._statm = -1

    def on_worker(self, payload: bytes) -> None:
        """Stop the worker with the end of its turn, by its looks: the host, which would order it then, need not.

        One that lies is stopped until the host, which was not told what it waits for, wakes it again.
        """
        if isinstance(self._worker, ByPidfd) and ends_turn(payload):
            self._signal(signal.SIGSTOP)
            self._stopped = True

    def on_order(self, order: int, turn: int) -> None:
        """See `Framing.on_order`."""
        if order == WAKE:
            self.set_turn(turn)
        if order in _SIGNALS:
            self._signal(_SIGNALS[order])
            self._stopped = order == STOP or (self._stopped and order != WAKE)
        elif order == MEASURE:
            self.send_vitals()
        if order == STOP and isinstance(self._worker, ByPid):
            control.send(self._supervisor, {"op": "stopped"})

    def on_remote(self, message: control.Message) -> None:
        """An order of the host that is the supervisor's, or a question."""
        op = message["op"]
        if op == "measure":
            self.send_message(self._peak())
        elif op in ("recover", "fresh"):
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                control.send(self._supervisor, message, (theirs.fileno(),))
            self.set_generation(mine, int(message["generation"]))
        else:
            control.send(self._supervisor, message)

    def on_local(self, message: control.Message, fds: list[int]) -> None:
        """A report of the supervisor; with one about a worker comes that worker's pidfd."""
        if "worker" in message:
            pid = int(message["worker"])
            self._take_worker(ByPidfd(pid, fds.pop()) if fds else ByPid(pid))
        for fd in fds:
            os.close(fd)
        self.send_vitals()
        self.send_message(message)

    def on_file(self, name: str) -> int:
        """A context the host has put beside the container."""
        if "/" in name or name.startswith("."):
            raise StreamFailed("a context has no such name")
        return os.open(f"{CONTEXTS}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def _signal(self, number: int) -> None:
        try:
            if self._worker is not None:
                self._worker.signal(number)
        except ProcessLookupError:
            pass  # it died; the supervisor reports it

    def vitals(self) -> tuple[float, int, bool] | None:
        """See `Multiplexer.vitals`."""
        process = self._worker
        if process is None:
            return None
        limit, field = self._data_limit_kb, _STATM_DATA
        try:
            cpu = time.clock_gettime((~process.pid << 3) | _CPUCLOCK_SCHED)
            if limit and isinstance(process, ByPid):  # without a limit on data it is the address space that is bounded
                limit, field = resource.prlimit(process.pid, resource.RLIMIT_AS)[0] // 1024, _STATM_SIZE
            pages = int(os.pread(self._statm, 256, 0).split()[field]) if limit else 0
        except (OSError, IndexError, ValueError):
            return None
        # What the kernel shows includes the stack, which the limit does not: it may be above it.
        return cpu, (max(0, limit - pages * _PAGE_KB) if limit else -1), self._stopped

    def _take_worker(self, process: Process) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._statm >= 0:
            os.close(self._statm)
        self._worker, self._statm, self._stopped = process, -1, False
        try:
            self._statm = os.open(f"/proc/{process.pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass  # it died already

    def _peak(self) -> control.Message:
        """Peak memory of the worker, as the kernel counts it."""
        try:
            pid = 0 if self._worker is None else self._worker.pid
            with open(f"/proc/{pid}/status") as file:
                sizes = {line.partition(":")[0]: line.split() for line in file}
            return {"op": "measured", "peak_kb": int(sizes["VmHWM"][1])}
        except (OSError, KeyError, ValueError):
            return {"op": "measured"}


class ContainerSupervisor(supervisor.Supervisor):
    """In a container of its own the kernel counts what it has killed for the container's memory limit."""

    def __init__(self, host: socket.socket, seconds: float | None) -> None:
        super().__init__(host, seconds)
        self._kills_file = -1
        for path in _MEMORY_KILLS:
            try:
                self._kills_file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            break
        self._kills = self._memory_kills()

    def _memory_kills(self) -> int:
        if self._kills_file < 0:
            return 0
        try:
            fields = os.pread(self._kills_file, 4096, 0).split()
            return int(fields[fields.index(b"oom_kill") + 1])
        except (OSError, ValueError, IndexError):
            return 0

    def _killed_for_memory(self) -> bool:
        before, self._kills = self._kills, self._memory_kills()
        return self._kills > before

    def _obey(self, message: control.Message, fds: list[int]) -> bool:
        """See `Supervisor._obey`. Signals to the worker, too: the host's user may have no right to send them."""
        if message["op"] != "signal":
            return super()._obey(message, fds)
        number = message["number"]
        if number not in _ORDERED_SIGNALS:
            return False
        try:
            if self._worker is not None:
                self._worker.signal(number)
        except ProcessLookupError:
            pass  # it died, which is reported
        return True


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


def _run_relay(data: socket.socket, supervisor_socket: socket.socket, outputs: dict[int, int], base_data: int) -> NoReturn:
    try:
        raw.close_all_except({0, 1, 2, data.fileno(), supervisor_socket.fileno(), *outputs.values()})
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        confine_relay()
        settings = _settings()
        key = bytes.fromhex(settings.pop("key", ""))  # the supervisor, of whom the worker is a copy, never has it
        control.send(supervisor_socket, settings)
        memory_mb = settings["memory_mb"]
        # What the worker may still allocate matters where its heap may have to be given up for a recovery point.
        limit = None if memory_mb is None or not settings["recovery"] else base_data // 1024 + memory_mb * 1024
        relay = Relay(data, supervisor_socket, outputs, limit)
        relay.authenticate(key)
        relay.run()
    except StreamFailed:
        pass  # the end of the host is the end of the session
    except Exception as exc:  # noqa: BLE001 - whatever it is, an operator should read it
        os.write(2, f"the relay failed: {type(exc).__name__}: {exc}\n".encode())
    finally:
        os._exit(0)


def _is_plain(permitted: bool) -> bool:
    """Whether to do without seccomp notifications and pidfds: where the host permits it, and the kernel has neither."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        lacking = True
    else:
        lacking = not raw.seccomp_notifications()
    if lacking and not permitted:
        raise OSError(errno.ENOSYS, "the kernel has no pidfds or no seccomp notifications; if this is gVisor, name its runtime")
    return lacking


def preload(packages: str = PACKAGES) -> None:
    """Import what sessions share, and the packages of the image's variant, which are in that directory."""
    names = list(PRELOADED)
    if os.path.isdir(packages):
        sys.path.append(packages)
        # With threads of their own their matrix products could hang in a forked worker. It is read when they are loaded.
        os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        names += [name for name in _VARIANT_PACKAGES if os.path.isdir(f"{packages}/{name}")]
    for name in names:
        importlib.import_module(name)


def check(self_test: int) -> int:
    """The image's self-check, for operators: says what a session would find here, and fails if it would not start."""
    worker.prepare(self_test)
    plain = _is_plain(permitted=True)
    found = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "mapped_texts": worker.MAPPED,
        "supervision": "by arguments alone (no seccomp notifications)" if plain else "by seccomp notifications",
        "packages": [name for name in _VARIANT_PACKAGES if name in sys.modules],
        "user": os.getuid(),
    }
    print(json.dumps(found))
    return 0 if os.getuid() != 0 else 1


def main(self_test: int, *, sockets: bool) -> NoReturn:
    """Be the session: does not return before it is over.

    ``self_test``: the process of `mapped_text.begin_self_test`; ``sockets``: which way to the host is taken, see the module.
    """
    raw.limit_malloc_arenas(ARENAS)
    worker.prepare(self_test)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sizes = own_sizes(proc)
    os.close(proc)
    gc.collect()
    gc.freeze()
    if sockets:
        _be_connected(sizes)
    _be_relayed(sizes)


def _plan(settings: control.Message, sizes: tuple[int, int]) -> SessionConfinement:
    return SessionConfinement(
        kernel_id=None,
        memory_mb=settings["memory_mb"],
        disk_mb=settings["disk_mb"],
        tasks=None,  # RLIMIT_NPROC counts a uid over all containers: the engine's pids limit does it
        base_data=sizes[0],
        base_address_space=sizes[1],
    )


def _be_connected(sizes: tuple[int, int]) -> NoReturn:
    """Connect to the host's socket and be the supervisor of what it hands over: the worker's channel, and its outputs."""
    _is_plain(permitted=False)
    host = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        host.connect(f"{CONTEXTS}/{HOST_SOCKET}")
        host.settimeout(_SETTINGS_SECONDS)  # a child that the host has forked meanwhile may keep the listening end
        got = control.receive(host)
        host.settimeout(None)
    except OSError as exc:
        raise SystemExit(f"{CANNOT_CONNECT} ({exc.strerror or exc})") from None
    if got is None:
        raise SystemExit(1)  # the host went away before it said what this session may use
    settings, fds = got
    if len(fds) != _CHANNELS:
        raise SystemExit(f"{CANNOT_CONNECT} (the kernel, or a policy of it, has kept back the descriptors it sent)")
    data, out, err = fds
    plan = _plan(settings, sizes)
    supervisor.main(
        lambda: confine_in_container(plan), set(), [data, host.detach(), out, err], settings["seconds"], ContainerSupervisor
    )


def _be_relayed(sizes: tuple[int, int]) -> NoReturn:
    """Fork the relay, and be the supervisor of what the host says through it."""
    data, data_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reports, reports_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    relay = os.fork()
    if relay == 0:
        _run_relay(data, reports, {STDOUT: out_read, STDERR: err_read}, sizes[0])
    reports.close()
    got = control.receive(reports_theirs)
    if got is None:
        raise SystemExit(1)  # the host went away before it said what this session may use
    settings, _ = got
    plan = _plan(settings, sizes)
    fds = [data_theirs.detach(), reports_theirs.detach(), out_write, err_write]
    if not _is_plain(bool(settings["plain"])):
        supervisor.main(lambda: confine_in_container(plan), set(), fds, settings["seconds"], ContainerSupervisor)
    raw.limit_malloc_arenas(1)  # an arena reserves 64 MB of what bounds memory here

    def make(host: socket.socket, seconds: float | None) -> PlainSupervisor:
        return PlainSupervisor(host, seconds, frozenset({relay}))

    supervisor.main(lambda: confine_in_plain_container(plan), set(), fds, settings["seconds"], make)
