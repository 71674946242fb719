"""`Interpreter`: one session's state in a worker process, over the life of several workers: feeds, recovery, renewal."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Container
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final

from ...errors import SandboxError
from ...limits import Limits
from ...results import Stream
from ...waiting import take
from . import values
from .failures import Ending, Failure, read_failure
from .pool import Slot
from .sealed import Sealed, seal, unseal
from .turn import EngineFailed, Turn, TurnStopped
from .worker import TooLarge, Worker

__all__ = ("FeedEnded", "Interpreter", "Origin", "Point")

log: Final = logging.getLogger("rlm_sandbox.host_calls")

#: Names of the intrinsics, which are no variables of the guest until it makes them some.
OWN_NAMES: Final = frozenset({"HostCallError", "hasattr", "round", "session_names"})
#: A recovery point is written while nobody waits; the next call waits for the rest of it this long.
_DUMP_SECONDS: Final = 20.0
#: Loading a recovery point ends within this, or the session starts empty.
_LOAD_SECONDS: Final = 10.0
#: Sources kept for tracebacks.
_KEPT_SOURCES: Final = 1_000

Listener = Callable[[Stream, str], None]


class FeedEnded(Exception):
    """A feed that did not complete. ``ending`` None: the host stopped it (``stopped``).

    ``idle``: the interpreter itself is between feeds and can go on.
    """

    def __init__(self, ending: Ending | None, stopped: TurnStopped | None, *, idle: bool = False) -> None:
        super().__init__()
        self.ending = ending
        self.stopped = stopped
        self.idle = idle


@dataclass(frozen=True, slots=True)
class Point:
    """The interpreter's state, sealed, and what of ours belongs to it. Kept in the host's memory only."""

    state: Sealed
    feeds: int
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a copy of an interpreter begins with."""

    point: Point
    sources: dict[int, tuple[str, str]]
    mark: str


class Interpreter:
    """Used by one thread at a time. ``names`` are the variables the guest may have, as far as the host knows."""

    def __init__(self, slot: Slot, limits: Limits, *, recovery: bool, origin: Origin | None = None) -> None:
        self._slot = slot
        self._limits = limits
        self._recovery = recovery
        self._mark = secrets.token_hex(8)
        self._sources: dict[int, tuple[str, str]] = {}
        self._parked: Point | None = None
        self._empty(slot.new_worker(limits, begun=origin is None))
        if origin is None:
            self._begin()
            return
        self._mark = origin.mark
        self._sources.update(origin.sources)
        if not self._load(origin.point):
            raise RuntimeError("the state could not be loaded into a new worker")

    def _empty(self, worker: Worker) -> None:
        self.worker = worker
        self._dumping: SimpleQueue[Any] | None = None
        self._point: Point | None = None
        self._feeds = 0
        self.names: set[str] = set()
        #: Something was fed since the recovery point was begun.
        self._changed = False

    def _begin(self) -> None:
        """With the intrinsics, in an empty worker.

        Raises:
            monty.MontyError, RuntimeError: the worker is broken.
        """
        state = self.worker.begin()
        self._feeds = 1
        self._sources.clear()
        self._point = Point(state, 1, frozenset()) if self._recovery else None
        self._slot.worker_is_ready()

    # ---- feeds

    def feed(
        self,
        turn: Turn,
        source: str,
        *,
        shown_as: tuple[str, str] | None = None,
        listen: Listener | None = None,
        inputs: dict[str, Any] | None = None,
    ) -> Any:
        """Run source and return the value of its last expression.

        Args:
            shown_as: the name and text of the source in a traceback; None for the machinery's own.

        Raises:
            FeedEnded: it did not complete.
        """
        if shown_as is not None:
            self._sources[self._feeds] = shown_as
            if len(self._sources) > _KEPT_SOURCES:
                del self._sources[next(iter(self._sources))]
        session = self.worker.session
        self._feeds += 1
        self._changed = True
        try:
            return turn.run(lambda: session.feed_start(source, inputs=inputs, print_callback=listen or _nowhere))
        except TurnStopped as exc:
            # The turn keeps it, and the engine may keep the turn: its frames would keep the caller's objects alive.
            raise FeedEnded(None, exc.with_traceback(None)) from None
        except EngineFailed as exc:
            raise FeedEnded(read_failure(exc.error, self.worker.alive, self._sources), None) from None
        except SandboxError:
            raise
        except Exception as exc:
            log.exception("a cell was ended because the host could not answer it")
            failure = Failure(f"the host could not answer the cell ({type(exc).__name__}); its log has the reason", "")
            raise FeedEnded(Ending("died", failure), None) from None

    def take(self, turn: Turn, names: tuple[str, ...]) -> dict[str, Any]:
        """The plain values of those variables that exist.

        Raises:
            FeedEnded: it did not complete.
            ValueRefused: they are too large.
        """
        wanted = [name for name in dict.fromkeys(names) if name not in OWN_NAMES or name in self.names]
        if not wanted:
            return {}
        found = self.feed(turn, f"_rlm_take(locals(), {wanted!r}, {self._mark!r})")
        if type(found) is not dict:
            return {}
        limit = self._limits.value_bytes
        return {name: values.from_guest(value, self._mark, limit) for name, value in found.items() if name in wanted}

    def summaries(self, turn: Turn, *, hidden: Container[str]) -> dict[str, str]:
        """The guest's variables, name to a short text, without those of ``hidden`` and the machinery's.

        Raises:
            FeedEnded: it did not complete.
        """
        found = self.feed(turn, "_rlm_summaries(locals())")
        own = OWN_NAMES - self.names
        return {
            key[:200]: text[:200]
            for key, text in (found.items() if type(found) is dict else ())
            if type(key) is str and type(text) is str and key not in hidden and key not in own
        }

    # ---- recovery

    @property
    def protected(self) -> bool:
        """True if there is a recovery point of the present state."""
        return self._point is not None

    def protect(self) -> None:
        """Start writing a recovery point of the present state; `settle` waits for the rest of it."""
        if not self._recovery or not self._changed:
            return
        self._point = None
        self._changed = False
        worker, feeds, names = self.worker, self._feeds, frozenset(self.names)
        self._dumping = SimpleQueue()
        worker.submit(lambda: _point(worker, feeds, names), self._dumping)

    def settle(self) -> bool:
        """Wait for a recovery point that is being written. False if the worker is dead."""
        dumping, self._dumping = self._dumping, None
        if dumping is not None:
            try:
                point, exc = take(dumping, _DUMP_SECONDS)
            except Empty:
                self.worker.kill()
                return False
            self._point = point if exc is None else None
            self._fed_by(exc)
        return self.worker.alive

    def present(self) -> Point | None:
        """The present state, None if it cannot be dumped. After `settle`, between feeds."""
        if self._point is not None and not self._changed:
            return self._point
        worker, feeds, names = self.worker, self._feeds, frozenset(self.names)
        done: SimpleQueue[Any] = SimpleQueue()
        worker.submit(lambda: _point(worker, feeds, names), done)
        try:
            point, exc = take(done, _DUMP_SECONDS)
        except Empty:
            worker.kill()
            return None
        if exc is not None:
            self._fed_by(exc)
            return None
        found: Point = point
        return found

    def _fed_by(self, exc: BaseException | None) -> None:
        """A state that was too large: tracebacks count the feeds."""
        if isinstance(exc, TooLarge):
            self._feeds += exc.feeds

    def restore(self) -> bool:
        """Replace the worker by one in the state of the recovery point. False if there is none or it cannot be loaded."""
        point = self._point
        return point is not None and self.go_to(point)

    def go_to(self, point: Point) -> bool:
        """Replace the worker by one in the state of ``point``. False if that cannot be loaded."""
        self._replace(begun=False)
        return self._load(point)

    def _load(self, point: Point) -> bool:
        worker = self.worker
        done: SimpleQueue[Any] = SimpleQueue()
        worker.submit(lambda: worker.load(unseal(point.state)), done)
        try:
            _, exc = take(done, _LOAD_SECONDS)
        except Empty:
            return False
        self._slot.worker_is_ready()
        if exc is not None:
            return False
        self._feeds = point.feeds
        self.names = set(point.names)
        self._point = point if self._recovery else None
        return True

    def renew(self) -> None:
        """Replace the worker by a fresh, empty one."""
        self._parked = None
        self._replace(begun=True)
        self._begin()

    def _replace(self, *, begun: bool) -> None:
        self.worker.close()
        self._slot.acquire()
        self._empty(self._slot.new_worker(self._limits, begun=begun))

    def origin(self) -> Origin | None:
        """What a copy of this interpreter begins with, None if the state cannot be dumped. Between feeds."""
        point = self.present()
        return None if point is None else Origin(point, dict(self._sources), self._mark)

    # ---- parking

    @property
    def parked(self) -> bool:
        """True if there is a state and no worker."""
        return self._parked is not None

    def park(self) -> bool:
        """Give the worker up, keeping its state. False if that cannot be dumped, or the worker is dead."""
        if self._parked is not None or not self.settle():
            return False
        self._parked = self.present()
        if self._parked is None:
            return False
        self.worker.close()
        self._slot.release()
        return True

    def wake(self) -> bool:
        """Take a worker again, after `park`. False if the state cannot be loaded into it.

        Raises:
            PoolTimeout: all workers are busy; the session stays parked.
        """
        assert self._parked is not None
        self._slot.acquire()
        point, self._parked = self._parked, None
        return self.go_to(point)

    def close(self) -> None:
        """End the worker and give the slot back. Idempotent; never raises."""
        self.worker.close()
        self._slot.release()
        self._point = self._parked = None
        self._dumping = None


def _point(worker: Worker, feeds: int, names: frozenset[str]) -> Point:
    return Point(seal(worker.dump()), feeds, names)


def _nowhere(stream: Stream, text: str) -> None:
    """Output of reading a value has no result to appear in."""
