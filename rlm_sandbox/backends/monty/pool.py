"""`Pool`: how many worker processes there are, the spare ones that wait for a session, and who must wait or be parked.

A worker serves one session and ends with it: whatever a guest may have done to its interpreter is not there for the next
one. What starting one costs is paid beforehand: a spare worker is confined, and waits.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

import pydantic_monty as monty

from ...errors import PoolTimeout
from ...limits import Limits
from ...waiting import take
from .worker import Worker

__all__ = ("INSIDE", "Pool", "Slot", "shared_pool")

#: How long opening a session waits for a free worker. Short: what would free one may be the caller's own.
OPEN_SECONDS: Final = 5.0
#: How long a call on a parked session does.
WAKE_SECONDS: Final = 30.0
#: Between two looks for a session that could be parked.
_LOOK_SECONDS: Final = 0.02
#: Ids of the pools whose workers wait for the host function that runs in this context: a session it uses must not wait
#: for them. Host pools copy the context.
INSIDE: Final[contextvars.ContextVar[frozenset[int]]] = contextvars.ContextVar("rlm_sandbox_monty_inside", default=frozenset())

_Kind = tuple[float | None, int | None]


class Pool:
    """Worker processes of one kind of confinement: at most ``size`` with a session, ``spares`` more of each kind."""

    def __init__(self, size: int, spares: int, binary: str | None) -> None:
        self.size = size
        self._spares_wanted = spares
        self._binary = binary
        self._lock = threading.Condition()
        self._used = 0
        self._slots: weakref.WeakSet[Slot] = weakref.WeakSet()
        self._kind: _Kind | None = None
        #: By whether they hold the intrinsics already: those are for new sessions, the empty ones for states to load.
        self._spares: dict[bool, list[Worker]] = {True: [], False: []}
        self._coming = {True: 0, False: 0}
        self._closed = False
        self._jobs: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any] | None]] = SimpleQueue()
        # Workers die with the thread that started them, so it is this one, which lives as long as the process.
        threading.Thread(target=self._spawn_for_ever, name="rlm-sandbox-monty-spawn", daemon=True).start()
        self._engine: monty.Monty = self._on_spawner(self._start_engine)
        atexit.register(self.close)

    # ---- the spawning thread

    def _spawn_for_ever(self) -> None:
        while True:
            job, reply = self._jobs.get()
            try:
                answer: tuple[Any, BaseException | None] = (job(), None)
            except BaseException as exc:  # noqa: BLE001 - for the thread that asked
                answer = (None, exc)
            if reply is not None:
                reply.put(answer)
            del job, reply, answer

    def _on_spawner(self, job: Callable[[], Any]) -> Any:
        reply: SimpleQueue[Any] = SimpleQueue()
        self._jobs.put((job, reply))
        value, exc = take(reply)
        if exc is not None:
            raise exc
        return value

    def _start_engine(self) -> monty.Monty:
        engine = monty.Monty(
            binary_path=self._binary,
            min_processes=0,
            max_processes=1 << 20,  # the slots are the limit
            checkout_timeout=OPEN_SECONDS,
            max_checkouts_per_worker=1,
            feed_duration_limit_grace=None,
            turn_duration_limit_grace=None,
        )
        engine.__enter__()
        return engine

    # ---- workers

    def worker(self, limits: Limits, *, begun: bool) -> Worker:
        """A worker under ``limits``, a spare one if there is one.

        Args:
            limits: its limits.
            begun: with the intrinsics; else empty, for a state to load.

        Raises:
            monty.MontyError, OSError, PoolTimeout: none can be started.
        """
        kind = (limits.time_seconds, limits.memory_mb)
        worker = self._take_spare(kind, begun)
        if worker is None:
            worker = self._on_spawner(lambda: self._start(kind, begun))
        try:
            worker.confine(limits.session_seconds)
        except BaseException:
            worker.close()
            raise
        return worker

    def _start(self, kind: _Kind, begun: bool) -> Worker:
        worker = Worker(self._engine, *kind)
        if begun:
            try:
                worker.begin()
            except BaseException:
                worker.close()
                raise
        return worker

    def _take_spare(self, kind: _Kind, begun: bool) -> Worker | None:
        with self._lock:
            unfit: list[Worker] = []
            if kind != self._kind:
                unfit = [*self._spares[True], *self._spares[False]]
                self._spares, self._kind = {True: [], False: []}, kind
            spares, found = self._spares[begun], None
            while spares and found is None:
                found = spares.pop()
                if not found.runs:
                    unfit.append(found)
                    found = None
        for worker in unfit:
            worker.close()
        return found

    def refill(self) -> None:
        """Have spare workers started for those taken. Apart from `worker`: starting one takes the time of a core."""
        with self._lock:
            kind = self._kind
            if kind is None:
                return
            for begun in (True, False):
                for _ in range(self._spares_wanted - len(self._spares[begun]) - self._coming[begun]):
                    self._coming[begun] += 1
                    self._jobs.put((functools.partial(self._add_spare, kind, begun), None))

    def _add_spare(self, kind: _Kind, begun: bool) -> None:
        worker = None
        try:
            if kind == self._kind and not self._closed:
                worker = self._start(kind, begun)
        finally:
            with self._lock:
                self._coming[begun] -= 1
                if worker is not None and kind == self._kind and not self._closed:
                    self._spares[begun].append(worker)
                    worker = None
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """End every worker."""
        self._closed = True
        with contextlib.suppress(Exception):
            self._engine.__exit__(None, None, None)

    # ---- slots

    def acquire(self, hold: _Hold, seconds: float) -> None:
        """Wait for a place, parking an idle session if there is one.

        Raises:
            PoolTimeout: none became free in time.
        """
        nested = id(self) in INSIDE.get()
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                if self._used < self.size or nested:
                    self._used += 1
                    hold.held = True
                    return
                # Least recently used first; thousands may be parked already.
                idle = sorted((slot for slot in self._slots if slot.hold.held), key=lambda slot: slot.used_at)
            if any(slot.park is not None and slot.park() for slot in idle):
                continue
            with self._lock:
                if self._used >= self.size:
                    self._lock.wait(_LOOK_SECONDS)
            if time.monotonic() >= deadline:
                raise PoolTimeout(
                    f"all {self.size} workers of the monty pool are running cells; wait for one, close a session, "
                    f"or open more with MontyOptions(max_processes={self.size * 2})"
                )

    def release(self, hold: _Hold) -> None:
        """Give a place back. Idempotent."""
        with self._lock:
            if hold.held:
                hold.held = False
                self._used -= 1
                self._lock.notify()

    def slot(self) -> Slot:
        """A place for a new session.

        Raises:
            PoolTimeout: none became free in time.
        """
        slot = Slot(self)
        self.acquire(slot.hold, OPEN_SECONDS)
        with self._lock:  # others look through them there
            self._slots.add(slot)
        return slot


class _Hold:
    """Whether a slot's place in the pool is taken; apart from the slot, so that a lost slot can be given back."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = False


class Slot:
    """The right of one session to a worker: kept while it works, given up while it is parked."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.hold = _Hold()
        self.used_at = time.monotonic()
        #: Asks the session to give its worker up; False if it cannot now. Must not keep the session alive.
        self.park: Callable[[], bool] | None = None
        weakref.finalize(self, pool.release, self.hold)

    def new_worker(self, limits: Limits, *, begun: bool) -> Worker:
        """A fresh worker under ``limits``, with the intrinsics or empty."""
        return self.pool.worker(limits, begun=begun)

    def acquire(self) -> None:
        """Take the place again, after `release`.

        Raises:
            PoolTimeout: none became free in time.
        """
        if not self.hold.held:
            self.pool.acquire(self.hold, WAKE_SECONDS)

    def release(self) -> None:
        """Give the place back. Idempotent."""
        self.pool.release(self.hold)

    def worker_is_ready(self) -> None:
        """The worker that was asked for has its state: the next one may be started."""
        self.pool.refill()


_pools: Final[dict[tuple[int, int, int, str | None], Pool]] = {}
_pools_lock: Final = threading.Lock()


def shared_pool(size: int, spares: int, binary: str | None) -> Pool:
    """The pool of these sizes, of this process: after a fork the parent's workers are the parent's."""
    key = (os.getpid(), size, spares, binary)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = Pool(size, spares, binary)
        return _pools[key]
