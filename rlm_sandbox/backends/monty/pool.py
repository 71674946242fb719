"""Pools of Monty worker processes, and `Worker`: one process with its kernel limits and the thread that talks to it."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import pydantic_monty as monty

from ...errors import PoolTimeout
from ...limits import Limits

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ("ENGINE", "KERNEL_LIMITS", "MAX_DUMP_BYTES", "Slot", "Worker", "open_slot")

#: Kernel limits can be put on a worker from outside.
KERNEL_LIMITS: Final = hasattr(resource, "prlimit")
#: How long opening a session waits for a free worker. Short: the session that would free it may be the caller's own.
SLOT_SECONDS: Final = 5.0
#: First element of the event a worker's thread posts when an engine call has ended.
ENGINE: Final = "engine"
#: A recovery point crosses in one frame, which the engine caps at 256 MiB; a larger heap is not dumped.
MAX_DUMP_BYTES: Final = 240 << 20
#: What the interpreter itself may take beyond the guest's heap.
_SLACK_BYTES: Final = 32 << 20
#: Address space the allocator reserves without using it.
_RESERVED_BYTES: Final = 256 << 20
_OPEN_FILES: Final = 32


class _Pool:
    """One engine pool. Our own slots limit it; the engine's own limit leaves room to replace killed workers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots = threading.BoundedSemaphore(size)
        # A worker serves one session only: whatever a guest may have done to its interpreter ends with it.
        self.engine = monty.Monty(
            min_processes=1,
            max_processes=2 * size + 1,
            checkout_timeout=SLOT_SECONDS,
            max_checkouts_per_worker=1,
            feed_duration_limit_grace=None,
            turn_duration_limit_grace=None,
        )
        self.engine.__enter__()
        atexit.register(self.close)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.engine.__exit__(None, None, None)


_pools: Final[dict[tuple[int, int], _Pool]] = {}
_pools_lock: Final = threading.Lock()


def _pool(size: int) -> _Pool:
    # Keyed by process: after a fork the parent's workers are the parent's.
    key = (os.getpid(), size)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = _Pool(size)
        return _pools[key]


class Slot:
    """The right of one session to a worker, kept while the session lives."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._release = weakref.finalize(self, pool.slots.release)

    def new_worker(self, limits: Limits) -> Worker:
        """A fresh interpreter under ``limits``."""
        return Worker(self._pool.engine, limits)

    def release(self) -> None:
        """Give the slot back. Idempotent."""
        self._release()


def open_slot(max_processes: int) -> Slot:
    """Wait for a place in the pool of that size.

    Raises:
        PoolTimeout: none became free in time.
    """
    pool = _pool(max_processes)
    if not pool.slots.acquire(timeout=SLOT_SECONDS):
        raise PoolTimeout(
            f"all {max_processes} workers of the monty pool are in use; close a session, "
            f"or open more with MontyOptions(max_processes={max_processes * 2})"
        )
    return Slot(pool)


def _serve(calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None]) -> None:
    """The thread of one worker: engine calls cannot be interrupted, so the session's caller never makes them itself."""
    while (item := calls.get()) is not None:
        call, mailbox = item
        try:
            answer: tuple[Any, BaseException | None] = (call(), None)
        except BaseException as exc:  # noqa: BLE001 - the caller gets it as an event
            answer = (None, exc)
        mailbox.put((ENGINE, *answer))
        del item, call, mailbox, answer


def _finish(
    session: monty.MontySession,
    calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None],
    pidfd: int | None,
    pid: int | None,
) -> None:
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


class Worker:
    """A worker process serving one session. Its methods may be called from any thread; `kill` at any time."""

    def __init__(self, engine: monty.Monty, limits: Limits) -> None:
        memory = None if limits.memory_mb is None else limits.memory_mb << 20
        # Writing a recovery point takes up to two copies of the heap; the kernel holds the cells to `memory` meanwhile.
        self._dump_room = 0 if memory is None else 2 * min(memory, MAX_DUMP_BYTES) + _SLACK_BYTES
        engine_memory = memory if memory is None or not KERNEL_LIMITS else memory + self._dump_room
        self.session = engine.checkout(
            limits={
                "max_feed_duration_secs": limits.time_seconds,
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
        self._pid = pid
        self._pidfd: int | None = None
        if pid is not None and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(pid)
        self._base_data, self._soft = 0, None if memory is None else memory
        if pid is not None and KERNEL_LIMITS:
            self._confine(pid, limits)
        self._calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), name="rlm-sandbox-monty", daemon=True).start()
        self._finalizer = weakref.finalize(self, _finish, self.session, self._calls, self._pidfd, pid)

    def _confine(self, pid: int, limits: Limits) -> None:
        """Kernel limits from outside, beneath the interpreter's own: they hold even if the interpreter is broken."""
        pages = [int(field) * resource.getpagesize() for field in Path(f"/proc/{pid}/statm").read_text().split()]
        self._base_data = pages[5]
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
        if limits.session_seconds is not None:
            # A worker that outlives its host is bounded too.
            seconds = int(limits.session_seconds) + 60
            resource.prlimit(pid, resource.RLIMIT_CPU, (seconds, seconds))
        if self._soft is not None:
            self._soft += self._base_data + _SLACK_BYTES
            self._hard = self._soft + self._dump_room
            space = pages[0] + self._hard + _RESERVED_BYTES
            resource.prlimit(pid, resource.RLIMIT_AS, (space, space))
            resource.prlimit(pid, resource.RLIMIT_DATA, (self._soft, self._hard))

    def submit(self, call: Callable[[], Any], mailbox: SimpleQueue[Any]) -> None:
        """Make an engine call on the worker's thread; its end is posted as ``(ENGINE, value, exception)``."""
        self._calls.put((call, mailbox))

    def dump(self) -> bytes | None:
        """The interpreter's state, or None if it is too large. An engine call: use `submit`."""
        if self._pid is None or not KERNEL_LIMITS or self._soft is None:
            return self.session.dump()
        data = int(Path(f"/proc/{self._pid}/statm").read_text().split()[5]) * resource.getpagesize()
        if data - self._base_data > MAX_DUMP_BYTES:
            return None
        resource.prlimit(self._pid, resource.RLIMIT_DATA, (self._hard, self._hard))
        try:
            return self.session.dump()
        finally:
            with contextlib.suppress(OSError):
                resource.prlimit(self._pid, resource.RLIMIT_DATA, (self._soft, self._hard))

    def load(self, state: bytes) -> None:
        """Take a state made by `dump` in this process. An engine call: use `submit`."""
        if self._pid is not None and KERNEL_LIMITS and self._soft is not None:
            resource.prlimit(self._pid, resource.RLIMIT_DATA, (self._hard, self._hard))
        self.session.load_session(state)
        if self._pid is not None and KERNEL_LIMITS and self._soft is not None:
            resource.prlimit(self._pid, resource.RLIMIT_DATA, (self._soft, self._hard))

    @property
    def alive(self) -> bool:
        """False once the engine has seen the process die. Only between turns."""
        return self.session.worker_pid is not None

    def kill(self) -> None:
        """End the process at once. Never raises."""
        _kill(self._pidfd, self._pid)

    def close(self) -> None:
        """End the process and free what belongs to it. Idempotent; never raises."""
        self._finalizer()
