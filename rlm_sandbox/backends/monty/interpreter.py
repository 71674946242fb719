"""`Interpreter`: one session's state in a worker process, over the life of several workers: feeds, recovery, renewal."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

from ...errors import SandboxError
from ...limits import Limits
from ...results import Stream
from . import values
from .failures import Ending, read_failure
from .pool import Slot
from .turn import Turn, TurnStopped

__all__ = ("OWN_NAMES", "FeedEnded", "Interpreter")

_INTRINSICS: Final = Path(__file__).with_name("guest_intrinsics.py")
#: Names of the intrinsics, which are no variables of the guest until it makes them some.
OWN_NAMES: Final = frozenset({"HostCallError", "session_names"})
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
class _Point:
    """A recovery point: the interpreter's state, and what of ours belongs to it. Kept in the host's memory only."""

    state: bytes
    feeds: int
    names: frozenset[str]


class Interpreter:
    """Used by one thread at a time. ``names`` are the variables the guest may have, as far as the host knows."""

    def __init__(self, slot: Slot, limits: Limits, *, recovery: bool) -> None:
        self._slot = slot
        self._limits = limits
        self._recovery = recovery
        self._mark = secrets.token_hex(8)
        self._feeds = 0
        self._sources: dict[int, tuple[str, str]] = {}
        self._point: _Point | None = None
        self._dumping: SimpleQueue[Any] | None = None
        self.names: set[str] = set()
        self.worker = slot.new_worker(limits)

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
        try:
            return turn.run(lambda: session.feed_start(source, inputs=inputs, print_callback=listen or _nowhere))
        except TurnStopped as exc:
            raise FeedEnded(None, exc) from None
        except Exception as exc:
            if isinstance(exc, SandboxError) or not _is_engines(exc):
                raise
            raise FeedEnded(read_failure(exc, self.worker.alive, self._sources), None) from None

    def feed_intrinsics(self, turn: Turn) -> None:
        """What every fresh interpreter needs first.

        Raises:
            FeedEnded: it did not complete.
        """
        self.feed(turn, _INTRINSICS.read_text(encoding="utf-8"))

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

    # ---- recovery

    @property
    def protected(self) -> bool:
        """True if there is a recovery point of the present state."""
        return self._point is not None

    def protect(self) -> None:
        """Start writing a recovery point of the present state; `settle` waits for the rest of it."""
        self._point = None
        if not self._recovery:
            return
        worker, feeds, names = self.worker, self._feeds, frozenset(self.names)

        def write() -> _Point | None:
            state = worker.dump()
            return None if state is None else _Point(state, feeds, names)

        self._dumping = SimpleQueue()
        worker.submit(write, self._dumping)

    def settle(self) -> bool:
        """Wait for a recovery point that is being written. False if the worker is dead."""
        dumping, self._dumping = self._dumping, None
        if dumping is not None:
            try:
                _, point, exc = dumping.get(timeout=_DUMP_SECONDS)
            except Empty:
                self.worker.kill()
                return False
            self._point = point if exc is None else None
        return self.worker.alive

    def restore(self) -> bool:
        """Replace the worker by one in the state of the recovery point. False if there is none or it cannot be loaded."""
        self._replace()
        point, worker = self._point, self.worker
        if point is None:
            return False
        done: SimpleQueue[Any] = SimpleQueue()
        worker.submit(lambda: worker.load(point.state), done)
        try:
            _, _, exc = done.get(timeout=_LOAD_SECONDS)
        except Empty:
            return False
        if exc is not None:
            return False
        self._feeds = point.feeds
        self.names = set(point.names)
        return True

    def renew(self) -> None:
        """Replace the worker by a fresh, empty one."""
        self._replace()
        self._point = None
        self._feeds = 0
        self._sources.clear()
        self.names = set()

    def _replace(self) -> None:
        self._dumping = None
        self.worker.close()
        self.worker = self._slot.new_worker(self._limits)

    def close(self) -> None:
        """End the worker and give the slot back. Idempotent; never raises."""
        self.worker.close()
        self._slot.release()
        self._point = None
        self._dumping = None


def _nowhere(stream: Stream, text: str) -> None:
    """Output of reading a value has no result to appear in."""


def _is_engines(exc: Exception) -> bool:
    # Engine calls raise MontyError, and builtin errors for a session that is gone or a value beyond its frames.
    return type(exc).__module__.startswith("pydantic_monty") or isinstance(exc, RuntimeError | ValueError | TypeError | OSError)
