"""`Worker`: one Monty process with its kernel limits, from before its session begins to its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import pydantic_monty as monty

from ...errors import PoolTimeout
from .sealed import Sealed, seal, unseal

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ("KERNEL_LIMITS", "MAX_DUMP_BYTES", "SLACK_BYTES", "TooLarge", "Worker", "dump_room")

#: Kernel limits can be put on a worker from outside.
KERNEL_LIMITS: Final = hasattr(resource, "prlimit")
#: A dump crosses in one frame, which the engine caps at this size; there is no option for it.
MAX_DUMP_BYTES: Final = 256 << 20
#: Heaps with more than this are not tried: their dump would not fit, and the attempt takes seconds.
_TRIED_BYTES: Final = 3 * MAX_DUMP_BYTES
_METHODS: Final = {
    kind.__name__: f" {' '.join(sorted(set(dir(kind)) - set(dir(object))))} "
    for kind in (str, bytes, int, float, list, tuple, dict, set, frozenset)
}
_INTRINSICS: Final = (
    Path(__file__).with_name("guest_intrinsics.py").read_text(encoding="utf-8") + f"\n_rlm_methods = {_METHODS!r}\n"
)
#: What the interpreter itself may take beyond the guest's heap.
SLACK_BYTES: Final = 32 << 20
#: Address space the allocator reserves without using it.
_RESERVED_BYTES: Final = 256 << 20
_OPEN_FILES: Final = 32

#: An interpreter's state with the intrinsics, by the limits it was made under: loading it takes half the time of running them.
_fresh: Final[dict[tuple[float | None, int | None], Sealed]] = {}

_Calls = SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None]


class TooLarge(Exception):
    """A state does not fit into a dump. ``feeds``: how often finding that out has fed the interpreter."""

    def __init__(self, feeds: int) -> None:
        super().__init__()
        self.feeds = feeds


def dump_room(memory_bytes: int) -> int:
    """Bytes a worker may take beyond its heap while its state is written or loaded, when no cell runs."""
    return 3 * min(memory_bytes, MAX_DUMP_BYTES) + SLACK_BYTES


class Worker:
    """A worker process for one session, with an empty interpreter: `begin` or `load` comes first. `kill` may at any time.

    Its engine calls are made by one thread at a time. Made on the pool's spawning thread, with whose end it is killed.
    """

    def __init__(self, engine: monty.Monty, time_seconds: float | None, memory_mb: int | None) -> None:
        memory = None if memory_mb is None else memory_mb << 20
        self._kind = (time_seconds, memory_mb)
        self._begun: Sealed | None = None
        # Writing a dump takes up to three times its size (measured: 2.1 to 3.0); the kernel holds the cells to `memory`.
        self._dump_room = 0 if memory is None else dump_room(memory)
        self._memory = memory
        engine_memory = memory if memory is None or not KERNEL_LIMITS else memory + self._dump_room
        self.session = engine.checkout(
            limits={
                "max_feed_duration_secs": time_seconds,
                "max_memory": engine_memory,
                "max_suspensions": (1 << 31) - 1,  # host calls are counted by us
            },
            os_policy={"sleep": "call_host"},
        )
        try:
            self.session.__enter__()
        except TimeoutError:
            raise PoolTimeout("no monty worker could be started in time; retry, or close sessions") from None
        pid = self.session.worker_pid
        self.pid = pid
        self._pidfd: int | None = None
        if pid is not None and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(pid)
        self._calls: _Calls = SimpleQueue()
        self._serving = False
        self._soft = self._hard = self._base_data = 0
        self._pages = self._statm() if pid is not None and KERNEL_LIMITS else []
        self._finalizer = weakref.finalize(self, _finish, self.session, self._calls, self._pidfd, pid)

    def begin(self) -> Sealed:
        """Bring the intrinsics into the empty interpreter, if it does not hold them yet. Returns that state."""
        if self._begun is None:
            known = _fresh.get(self._kind)
            if known is None:
                self.session.feed_run(_INTRINSICS)
                known = _fresh[self._kind] = seal(self.session.dump())
            else:
                self.session.load_session(unseal(known))
            self._begun = known
        return self._begun

    def _statm(self) -> list[int]:
        return [int(field) * resource.getpagesize() for field in Path(f"/proc/{self.pid}/statm").read_text().split()]

    def confine(self, session_seconds: float | None) -> None:
        """Kernel limits from outside, beneath the interpreter's own: they hold even if the interpreter is broken.

        Raises:
            OSError: the process is gone.
        """
        pid = self.pid
        if pid is None or not self._pages:
            return
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
        if session_seconds is not None:
            # A worker that outlives its host is bounded too.
            seconds = int(session_seconds) + 60
            resource.prlimit(pid, resource.RLIMIT_CPU, (seconds, seconds))
        if self._memory is not None:
            self._base_data = self._pages[5]
            self._soft = self._memory + self._base_data + SLACK_BYTES
            self._hard = self._soft + self._dump_room
            space = self._pages[0] + self._hard + _RESERVED_BYTES
            resource.prlimit(pid, resource.RLIMIT_AS, (space, space))
            resource.prlimit(pid, resource.RLIMIT_DATA, (self._soft, self._hard))

    def submit(self, call: Callable[[], Any], mailbox: SimpleQueue[Any]) -> None:
        """Make an engine call on a thread of the worker's own; its end is posted as ``(value, exception)``."""
        if not self._serving:
            self._serving = True
            threading.Thread(target=_serve, args=(self._calls,), name="rlm-sandbox-monty", daemon=True).start()
        self._calls.put((call, mailbox))

    def dump(self) -> bytes:
        """The interpreter's state.

        Raises:
            TooLarge: it does not fit into a dump; the interpreter has been fed once more.
            monty.MontyError: the worker is broken.
        """
        if self._soft and self.pid is not None and self._statm()[5] - self._base_data > _TRIED_BYTES:
            raise TooLarge(feeds=0)
        with self._room():
            try:
                return self.session.dump()
            except monty.MontyRuntimeError as exc:
                if "exceeds the maximum" not in str(exc):
                    raise
                # The engine holds on to what it could not send until it is fed again.
                self.session.feed_run("pass")
                raise TooLarge(feeds=1) from None

    def load(self, state: bytes) -> None:
        """Take a state made by `dump` in this process."""
        with self._room():
            self.session.load_session(state)

    @contextlib.contextmanager
    def _room(self) -> Any:
        """The memory that a dump needs beside the heap."""
        if not self._soft or self.pid is None:
            yield
            return
        resource.prlimit(self.pid, resource.RLIMIT_DATA, (self._hard, self._hard))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                resource.prlimit(self.pid, resource.RLIMIT_DATA, (self._soft, self._hard))

    @property
    def alive(self) -> bool:
        """False once the engine has seen the process die. Only between turns."""
        return self.session.worker_pid is not None

    @property
    def runs(self) -> bool:
        """False if the process has ended, whether the engine has seen it or not."""
        if self._pidfd is None:
            return self.alive
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def kill(self) -> None:
        """End the process at once. Never raises."""
        _kill(self._pidfd, self.pid)

    def close(self) -> None:
        """End the process and free what belongs to it. Idempotent; never raises."""
        self._finalizer()


def _serve(calls: _Calls) -> None:
    while (item := calls.get()) is not None:
        call, mailbox = item
        try:
            answer: tuple[Any, BaseException | None] = (call(), None)
        except BaseException as exc:  # noqa: BLE001 - the caller gets it as an event
            answer = (None, exc)
        mailbox.put(answer)
        del item, call, mailbox, answer


def _finish(session: monty.MontySession, calls: _Calls, pidfd: int | None, pid: int | None) -> None:
    _kill(pidfd, pid)
    calls.put(None)
    with contextlib.suppress(Exception):
        session.__exit__(None, None, None)
    if pidfd is not None:
        with contextlib.suppress(OSError):
            os.close(pidfd)


def _kill(pidfd: int | None, pid: int | None) -> None:
    with contextlib.suppress(OSError):
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        elif pid is not None:
            os.kill(pid, signal.SIGKILL)
