"""`SessionPool`: sessions that were opened while nobody waited, a bound on how many there are, and a queue for the rest.

A session serves one user and ends with it. What the pool keeps is only sessions that nobody has used yet.

Nesting never deadlocks: a session that is opened from inside a host function of one of the pool's sessions belongs to the
next level, and each level has the whole ``size`` to itself. So nobody ever waits for a session that waits for him, and at
most ``size`` sessions per level are in use.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import itertools
import logging
import os
import threading
import time
import types
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Literal, Self

from .errors import PoolTimeout, SandboxError, SessionClosed
from .limits import Limits
from .options import BackendOptions
from .pooled import Nesting, pooled
from .protocol import Grade, REPLProtocol, SupportsWaiting
from .registry import open_repl
from .waiting import wait_until

__all__ = ("SessionPool",)

log: Final = logging.getLogger("rlm_sandbox.pool")

#: Sessions that wait for a user unless the caller says otherwise: one that is taken is replaced within milliseconds.
_READY: Final = 2
#: After one was taken: its taker needs the processor more.
_PAUSE_SECONDS: Final = 0.01
#: How often the sessions that wait are looked after, so that one of them that died costs nobody a wait.
_CHECK_SECONDS: Final = 30.0
#: A session that cannot begin its ``session_seconds`` anew may have used up this share of them while it waited.
_STALE_SHARE: Final = 0.05
#: By pool: how many of its sessions wait for the host function that runs in this context. Host pools copy the context.
_LEVELS: Final[contextvars.ContextVar[Mapping[int, int]]] = contextvars.ContextVar(
    "rlm_sandbox_pool_levels", default=types.MappingProxyType({})
)
_CLOSED: Final = "the pool was closed; make a new one"
_keys: Final = itertools.count(1)


class SessionPool:
    """Sessions of one kind, ready to be used. Thread-safe; a context manager.

    ```python
    with SessionPool("jail", size=8, limits=Limits(memory_mb=256)) as pool:
        with pool.open_repl() as repl:
            repl.exec("x = 1")
    ```

    Args:
        backend: a backend's name, or ``auto``, as in `open_repl`.
        size: sessions in use at once, from 1 to 10,000; more wait in a queue, first come, first served. A session that is
            opened inside a host function of another one of the pool does not queue behind it: see the module.
        limits: of each session, as in `open_repl`. ``session_seconds`` begin when a session is handed out.
        ready: sessions kept open beside those in use, from 0 to ``size``; 2 by default. 0 leaves the bound and the queue.
        timeout_seconds: how long `open_repl` waits for a free place unless it is told otherwise; None for ever.
        accept, trusted, setup, files, packages, recovery, options: of each session, as in `open_repl`. ``setup`` has run
            before a session is handed out.

    Raises:
        BackendUnavailable, UnsupportedLimit, GuestError, TypeError, ValueError: as `open_repl`, whose first session is
            opened here.
    """

    def __init__(
        self,
        backend: str = "auto",
        size: int = 8,
        limits: Limits | None = None,
        *,
        ready: int | None = None,
        timeout_seconds: float | None = 30.0,
        accept: Grade = Grade.HARD,
        trusted: bool = False,
        setup: str = "",
        files: Mapping[str, Any] | tuple[()] = (),
        packages: tuple[str, ...] = (),
        recovery: bool = True,
        options: BackendOptions | None = None,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be a whole number of sessions, not {type(size).__name__}")
        if not 1 <= size <= 10_000:
            raise ValueError(f"size must be between 1 and 10,000 sessions, got {size}")
        if ready is None:
            ready = min(_READY, size)
        if isinstance(ready, bool) or not isinstance(ready, int):
            raise TypeError(f"ready must be a whole number of sessions, not {type(ready).__name__}")
        if not 0 <= ready <= size:
            raise ValueError(f"ready must be between 0 and size={size} sessions, got {ready}")
        self.size = size
        self._timeout = _checked_timeout(timeout_seconds)
        self._owner = os.getpid()
        self._key = next(_keys)
        self._places = _Places(size)
        arguments: dict[str, Any] = {
            "limits": limits, "accept": accept, "trusted": trusted, "setup": setup, "files": files,
            "packages": packages, "recovery": recovery, "options": options,
        }  # fmt: skip
        self._stock = _Stock(backend, arguments, ready)
        self._stock.put(self._stock.make())
        self._finalizer = weakref.finalize(self, self._stock.close)
        if ready:
            filler = threading.Thread(target=self._stock.fill_for_ever, name="rlm-sandbox-pool", daemon=True)
            filler.start()
            self._stock.wanted.set()

    def open_repl(self, timeout_seconds: float | Literal["pool"] | None = "pool") -> REPLProtocol:
        """A session nobody has used: one that is ready, else a new one.

        Args:
            timeout_seconds: how long to wait for a place; None for ever; ``"pool"``, the default: as long as the pool's own.

        Raises:
            PoolTimeout: no place became free in time.
            SessionClosed: the pool is closed, or belongs to the process this one was forked from.
            BackendUnavailable: a new session had to be opened and could not be.
        """
        timeout = self._timeout if timeout_seconds == "pool" else _checked_timeout(timeout_seconds)
        self._check_open()
        return self._with_place(_LEVELS.get().get(self._key, 0), timeout, self._stock.take_or_make)

    def _with_place(self, level: int, timeout: float | None, get: Callable[[], REPLProtocol]) -> REPLProtocol:
        """What ``get`` gives, as a session that holds a place of ``level``."""
        place = self._places.take(level, timeout)
        try:
            session = get()
        except BaseException:
            place.free()
            raise
        copied = functools.partial(self._with_place, level, self._timeout)
        return pooled(session, Nesting(_LEVELS, self._key, level + 1), place.free, copied)

    def _check_open(self) -> None:
        if self._owner != os.getpid():
            raise SessionClosed("the pool belongs to the process that made it; make one in this process")
        if self._stock.closed:
            raise SessionClosed(_CLOSED)

    def close(self) -> None:
        """End the sessions that are ready and hand out no more; who waits gets `SessionClosed`. Idempotent.

        Sessions in use are their users' to close.
        """
        self._finalizer()
        self._places.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _checked_timeout(seconds: float | None) -> float | None:
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"timeout_seconds must be a number of seconds or None, not {type(seconds).__name__}")
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout_seconds must be a number of seconds, 0 or more, or None, got {seconds!r}")
    return float(seconds)


class _Stock:
    """Opens sessions and keeps those that are ready. Apart from the pool, so that the thread does not keep a lost one alive."""

    def __init__(self, backend: str, arguments: dict[str, Any], ready: int) -> None:
        self.closed = False
        self.wanted = threading.Event()
        self._backend = backend
        self._arguments = arguments
        self._ready = ready
        self._owner = os.getpid()
        self._sessions: collections.deque[tuple[REPLProtocol, float]] = collections.deque()
        limits = arguments["limits"] if arguments["limits"] is not None else Limits()
        self._check_seconds = min(_CHECK_SECONDS, (limits.session_seconds or _CHECK_SECONDS) / 4)

    def make(self) -> REPLProtocol:
        """A new session. Raises what `open_repl` does."""
        return open_repl(self._backend, **self._arguments)

    def put(self, session: REPLProtocol) -> None:
        """Keep a session until somebody takes it."""
        self._sessions.append((session, time.monotonic()))
        if self.closed:  # meanwhile
            self._empty()

    def take(self) -> REPLProtocol | None:
        """A session that is ready, or None."""
        try:
            while True:
                session, since = self._sessions.popleft()
                if self._is_fresh(session, since):
                    return session
                session.close()
        except IndexError:
            return None
        finally:
            self.wanted.set()

    def take_or_make(self) -> REPLProtocol:
        """A session that is ready, else a new one. Raises what `open_repl` does."""
        return self.take() or self.make()

    def _is_fresh(self, session: REPLProtocol, since: float) -> bool:
        if isinstance(session, SupportsWaiting):
            return session.begin()
        seconds = session.limits.session_seconds
        return seconds is None or time.monotonic() - since <= _STALE_SHARE * seconds

    def fill_for_ever(self) -> None:
        """Replace what is taken or has died, until the end. What cannot be opened is the next caller's to hear of."""
        while not self.closed:
            if self.wanted.wait(self._check_seconds):
                time.sleep(_PAUSE_SECONDS)
                self.wanted.clear()
            else:
                self._look_after()
            try:
                while not self.closed and len(self._sessions) < self._ready:
                    self.put(self.make())
            except SandboxError as exc:
                log.warning("a session could not be opened in advance: %s", exc)
            except Exception:
                log.exception("a session could not be opened in advance")

    def _look_after(self) -> None:
        """Begin the time of the sessions that wait anew, and end those that did not live."""
        for _ in range(len(self._sessions)):
            session = self.take()
            if session is None:
                return
            self.put(session)

    def close(self) -> None:
        """End what is ready; nothing is opened any more."""
        self.closed = True
        self.wanted.set()
        self._empty()

    def _empty(self) -> None:
        if self._owner != os.getpid():
            return  # in a forked child of the host they are the parent's
        with contextlib.suppress(IndexError):
            while True:
                self._sessions.popleft()[0].close()


class Place:
    """The right to one session in use."""

    def __init__(self, places: _Places, level: int) -> None:
        self.level = level
        self._places = places
        self._held = True

    def free(self) -> None:
        """Give it back. Idempotent."""
        self._places.give_back(self)


class _Places:
    """So many places on each level, and a queue for each. Reentrant: a lost session may be collected at any moment."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.RLock()
        self._used: collections.Counter[int] = collections.Counter()
        self._queues: collections.defaultdict[int, collections.deque[_Waiter]] = collections.defaultdict(collections.deque)
        self._closed = False

    def take(self, level: int, timeout: float | None) -> Place:
        """A place of a level.

        Raises:
            PoolTimeout, SessionClosed: see `SessionPool.open_repl`.
        """
        with self._lock:
            if self._closed:
                raise SessionClosed(_CLOSED)
            if self._used[level] < self._size and not self._queues[level]:
                self._used[level] += 1
                return Place(self, level)
            waiter = _Waiter()
            self._queues[level].append(waiter)
        try:
            wait_until(waiter.called.wait, timeout)
        except BaseException:  # Ctrl-C
            self._leave(level, waiter)
            if waiter.granted:
                Place(self, level).free()
            raise
        self._leave(level, waiter)
        if waiter.called.is_set() and not waiter.granted:
            raise SessionClosed(_CLOSED)
        if not waiter.granted:
            where = "" if not level else f" at depth {level}"
            raise PoolTimeout(
                f"all {self._size} sessions of the pool{where} were in use for {timeout:g} seconds; close a session, wait longer "
                f"(timeout_seconds=...) or make the pool larger (size=...)"
            )
        return Place(self, level)

    def _leave(self, level: int, waiter: _Waiter) -> None:
        """Take a waiter that was not called out of its queue."""
        with self._lock, contextlib.suppress(ValueError):
            self._queues[level].remove(waiter)

    def give_back(self, place: Place) -> None:
        """Hand a place to who has waited longest."""
        with self._lock:
            if not place._held:
                return
            place._held = False
            queue = self._queues[place.level]
            if queue:
                waiter = queue.popleft()
                waiter.granted = True
                waiter.called.set()
            else:
                self._used[place.level] -= 1

    def close(self) -> None:
        """Send home who waits."""
        with self._lock:
            self._closed = True
            waiting = [waiter for queue in self._queues.values() for waiter in queue]
            self._queues.clear()
            for waiter in waiting:
                waiter.called.set()


class _Waiter:
    __slots__ = ("called", "granted")

    def __init__(self) -> None:
        self.called = threading.Event()
        self.granted = False
