"""What the escape tests judge by: everything is seen from outside the guest, whose own word is never evidence."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import psutil

from rlm_sandbox import ExecResult, Limits, REPLProtocol
from rlm_sandbox.results import Outcome, State

from ..spares import living

__all__ = (
    "KEPT",
    "RESTORED",
    "SURVIVED",
    "TOOLS",
    "Attack",
    "Listener",
    "SessionProcesses",
    "assert_contained",
    "everything_said",
    "wait_until",
    "within",
)

#: A loaded machine's share; the promise itself is the limit and two seconds.
PATIENCE_SECONDS: Final = 20.0
RECOVERY_SECONDS: Final = 2.0
#: Supervisor, worker, standby.
PROCESSES_OF_A_SESSION: Final = 3

KEPT: Final[tuple[State, ...]] = ("kept",)
RESTORED: Final[tuple[State, ...]] = ("restored",)
#: Either way every variable from before is there.
SURVIVED: Final[tuple[State, ...]] = ("kept", "restored")

#: What an attacker brings along: the channel's framing, and the descriptors the worker holds by what they are.
TOOLS: Final = """
import ctypes, json, mmap, os, resource, signal, socket, stat, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def frame(message, attachments=()):
    head = json.dumps(message).encode()
    table = b"".join(struct.pack("<BQ", 0, len(part)) for part in attachments)
    return struct.pack("<HBBII", 0x4C52, 1, 0, len(head), len(attachments)) + table + head + b"".join(attachments)
def find(kind):
    for fd in range(3, 256):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as sock:
                    if sock.type == kind:
                        return fd
        except OSError:
            pass
data, birth = find(socket.SOCK_STREAM), find(socket.SOCK_SEQPACKET)
DONE = frame(["done", None, None, None, False, None])
"""


@dataclass(frozen=True, slots=True)
class Attack:
    """One case. ``goal`` is what the attacker wants; ``outcomes`` and ``states`` are what may come of it."""

    id: str
    goal: str
    code: str
    outcomes: tuple[Outcome, ...] = ("ok",)
    states: tuple[State, ...] = KEPT
    after: tuple[State, ...] = KEPT
    """What the next, harmless cell may say of the state."""
    tools: bool = False
    """Whether the cell before brings `TOOLS`."""
    forges_next: bool = False
    """Whether a thread it leaves behind may answer for the next cell: a guest's own words (decision 0006). The cell after says so."""


class SessionProcesses:
    """The processes that came since this was made, below this one: the session's, as the kernel lists them."""

    def __init__(self) -> None:
        self._before = {process.pid for process in living(psutil.Process())}

    def alive(self) -> list[psutil.Process]:
        """Those that run, sleep or are stopped, without the spare that a zygote makes of its own accord."""
        return [process for process in living(psutil.Process()) if process.pid not in self._before]

    def resident_mb(self) -> float:
        """The largest resident set among them."""
        sizes = [0.0]
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss / 2**20)
        return max(sizes)

    def cpu_seconds(self) -> float:
        """CPU time of all of them."""
        total = 0.0
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def assert_quiet(self, seconds: float = 0.1) -> None:
        """No more processes than a session has, and none of them uses the CPU between cells."""
        wait_until(lambda: len(self.alive()) <= PROCESSES_OF_A_SESSION, f"the session has too many processes: {self.alive()}")

        def rests() -> bool:
            before = self.cpu_seconds()
            time.sleep(seconds)
            return self.cpu_seconds() - before < seconds * 0.6

        # What a cell left for afterwards (a standby, its end) may take its time; what never rests is found all the same.
        wait_until(rests, "something of the session runs between cells")

    def assert_gone(self) -> None:
        """Nothing is left."""
        wait_until(lambda: not self.alive(), f"left behind: {self.alive()}")


@dataclass(slots=True)
class Listener:
    """A server on the host's loopback that must never be reached, by TCP or by an abstract unix name."""

    tcp: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    unix: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX))
    name: str = ""

    def __post_init__(self) -> None:
        self.unix.bind("")  # the kernel gives it an abstract name
        self.name = self.unix.getsockname()[1:].decode()
        self.unix.listen()

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.tcp.getsockname()[1])

    def assert_unreached(self) -> None:
        """Nobody connected."""
        for server in (self.tcp, self.unix):
            server.setblocking(False)
            try:
                server.accept()
            except BlockingIOError:
                continue
            raise AssertionError("a guest reached a listener of the host")

    def close(self) -> None:
        """Close both."""
        self.tcp.close()
        self.unix.close()


def wait_until(true: Callable[[], bool], otherwise: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for something that must come about. Raises AssertionError if it does not."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, otherwise
        time.sleep(0.02)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What runs inside ends in time."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took < seconds + PATIENCE_SECONDS, f"took {took:.2f} s; {seconds:.2f} s are promised"


def everything_said(*results: ExecResult) -> str:
    """All that came out of a guest."""
    return "\n".join(str(part) for r in results for part in (r.stdout, r.stderr, r.value, r.error, r.traceback, r.read))


def assert_contained(repl: REPLProtocol, attack: Attack, processes: SessionProcesses) -> ExecResult:
    """The attack ends in time and as it may, and the next cell finds what was there before."""
    if attack.tools:
        assert repl.exec(TOOLS).ok
    assert repl.exec("x = {'kept': [41]}").ok
    # A cell that is to end by itself has time to do so on a loaded machine; one that is to be ended is ended soon.
    narrow = Limits(time_seconds=1.0) if "limit" in attack.outcomes else None
    limit = repl.limits.narrowed(narrow).time_seconds or 0.0
    with within(limit + RECOVERY_SECONDS):
        result = repl.exec(attack.code, limits=narrow)
    assert result.outcome in attack.outcomes, f"{result.outcome}: {result.error}"
    assert result.state in attack.states, f"{result.state}, lost {result.lost_names}"
    with within(limit + RECOVERY_SECONDS):
        following = repl.exec("x['kept'][0] + 1")
    if attack.forges_next and (following.outcome, following.value) != ("ok", "42"):
        forged, following = following, repl.exec("x['kept'][0] + 1")
        assert "restored" in (forged.state, following.state), f"an answer was forged, and the next result says {following.state}"
    assert (following.outcome, following.value) == ("ok", "42"), f"{following.outcome}: {following.error}"
    assert following.state in attack.after, following.state
    processes.assert_quiet()
    return result
