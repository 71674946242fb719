"""The contract: `REPLProtocol`, what every backend implements, and `Capabilities`, what it says about itself.

A backend implements this and never widens it. Anything optional is a declared capability or one of the
``Supports...`` protocols at the end.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, runtime_checkable

from .limits import Limits
from .results import ExecResult, OutputChunk

__all__ = (
    "Capabilities",
    "Feature",
    "Grade",
    "REPLProtocol",
    "SupportsCheckpoint",
    "SupportsFork",
    "SupportsReadFile",
    "SupportsWaiting",
)


class Grade(enum.IntEnum):
    """How firmly a limit is enforced. Ordered: ``HARD > COOPERATIVE > NONE``."""

    NONE = 0
    #: Guest-side: ordinary code obeys it, a C call may overrun it, hostile code may defeat it.
    COOPERATIVE = 1
    #: By kernel or engine, from outside the guest.
    HARD = 2


class Feature(enum.StrEnum):
    """A feature of Python that a backend's guest has. What is not declared is refused or differs."""

    CPYTHON = "cpython"
    """The guest is a full CPython with its standard library: every feature of the language below. What depends on the
    system around it is declared apart: `THREADS`, `FILES`, `RAW_DESCRIPTORS`."""
    CLASSES = "classes"
    INHERITANCE = "inheritance"
    GENERATORS = "generators"
    CLOSURES = "closures"
    DEL = "del"
    IMPORTS = "imports"
    """Pure and C modules of the standard library, beyond the few every guest has (re, json, math)."""
    MATCH = "match"
    ASYNC = "async"
    TOP_LEVEL_AWAIT = "top_level_await"
    THREADS = "threads"
    LATE_GLOBALS = "late_globals"
    ECHO = "echo"
    """The last expression of a cell is its value."""
    INPUT_EOF = "input_eof"
    """``input()`` raises EOFError."""
    SYSTEM_EXIT = "system_exit"
    """``SystemExit`` and ``KeyboardInterrupt`` raised by the cell are results with their own type name."""
    SOURCE_TRACEBACKS = "source_tracebacks"
    """Tracebacks name ``<cell N>`` and show source lines."""
    FILES = "files"
    """A writable ``/tmp``."""
    RAW_DESCRIPTORS = "raw_descriptors"
    """``os.write(1, ...)`` and C-level output are captured."""


#: Features that an interpreter alone cannot have.
_OF_THE_SYSTEM: Final = frozenset({Feature.THREADS, Feature.FILES, Feature.RAW_DESCRIPTORS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a session of a backend enforces and offers. The grades carry the names of the limits."""

    backend: str
    isolation: str
    """One sentence for people: what stands between the guest and the host."""
    time_seconds: Grade
    wall_seconds: Grade
    output_bytes: Grade
    host_calls: Grade
    value_bytes: Grade
    memory_mb: Grade
    processes: Grade
    disk_mb: Grade
    session_seconds: Grade
    network: Grade
    crash: Grade
    """A guest crash cannot touch the host."""
    interrupt: Grade
    """`interrupt()` ends a cell whatever it does."""
    language: frozenset[Feature] = frozenset()
    soft_interrupt: bool = False
    """A time limit or interrupt is first tried in a way that keeps the state."""
    recovery: Literal["none", "kept", "standby", "replay", "dump"] = "none"
    context_route: Literal["mapped", "host_calls", "streamed", "object"] = "host_calls"
    files: bool = False
    packages: bool = False
    fork: bool = False
    guest_threads: bool = False
    host_memory_worst_mb: int | None = None
    """The most host memory one session can take, None if it is not bounded."""
    layers: frozenset[str] = frozenset()
    """Mechanisms in force around a session, by the names that ``rlm-sandbox doctor`` uses; ``cgroup`` with each controller."""
    notes: tuple[str, ...] = field(default=())

    def grade(self, limit: str) -> Grade:
        """The grade of a limit by its `Limits` field name, or of ``crash`` and ``interrupt``.

        Raises:
            AttributeError: there is no such limit.
        """
        value = getattr(self, limit)
        if not isinstance(value, Grade):
            raise AttributeError(f"{limit!r} is not a graded capability")
        return value

    def has(self, feature: Feature) -> bool:
        """True if the guest's language has ``feature``."""
        return feature in self.language or (Feature.CPYTHON in self.language and feature not in _OF_THE_SYSTEM)


@runtime_checkable
class REPLProtocol(Protocol):
    """A sandboxed Python REPL. One call at a time, from any thread.

    A second call while one runs, also from inside the session's own host function, raises `SessionBusy`; only
    `interrupt` and `close` may come concurrently. Every method but `close` raises `SessionClosed` after the end.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def limits(self) -> Limits: ...

    def exec(
        self,
        code: str,
        *,
        limits: Limits | None = None,
        read: tuple[str, ...] = (),
        on_output: Callable[[OutputChunk], None] | None = None,
    ) -> ExecResult:
        """Run one cell and say what came of it. Nothing the guest does makes this raise.

        Args:
            code: the cell's source.
            limits: may only narrow the session's per-cell limits.
            read: names whose values come back in ``ExecResult.read``, in the same turn.
            on_output: called on the calling thread with each piece of output as it appears.

        Raises:
            SessionBusy, SessionClosed: see the class.
            TypeError, ValueError: the arguments are wrong; the guest did not run.
            KeyboardInterrupt: Ctrl-C on the host: the cell was interrupted, the session is usable.
        """

    def get(self, name: str, default: Any = None) -> Any:
        """The plain value of a guest variable, or ``default`` if there is no such name.

        What is not plain data arrives as `Opaque`.

        Raises:
            GuestError, LimitExceeded, GuestCrashed, ProtocolViolation: reading ran guest code, which failed.
        """

    def set(self, name: str, value: Any) -> None:
        """Give a guest variable a plain value.

        Raises:
            UnsendableValue: ``value`` cannot cross exactly.
            TypeError: ``value`` is callable: use `bind`.
        """

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """Make a host function, an `expose`d object or a `Context` reachable under ``name``.

        Args:
            name: the name in the guest.
            target: a function (an ``async def`` is awaitable in the guest), an `Exposed`, a `Context`, or
                ``context.whole`` (its text as one ``str``).
            inline: run the function on the thread that called ``exec`` and not on the session's host pool.
                ``exec`` then cannot return before the function does.
            errors: exception classes whose message the guest may see. Others become ``HostCallError: NAME failed``.

        Raises:
            TypeError: ``target`` can't be bound.
        """

    def names(self) -> dict[str, str]:
        """The guest's variables: name to a short, capped summary."""

    def interrupt(self) -> None:
        """End the running cell, if any. Its result has ``outcome="interrupted"``. Never raises, returns at once."""

    def reset(self) -> None:
        """Empty the session: every variable goes; bindings and setup are applied again."""

    def close(self) -> None:
        """End the session and free everything of it. Idempotent; never raises."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@runtime_checkable
class SupportsFork(Protocol):
    """A session that can be copied (``capabilities.fork``)."""

    def fork(self) -> REPLProtocol:
        """An independent session with the same state."""


@runtime_checkable
class SupportsCheckpoint(Protocol):
    """A session that can go back several cells."""

    def checkpoint(self) -> str:
        """Remember the present state; returns an opaque id."""

    def restore(self, checkpoint: str) -> None:
        """Go back to a state remembered by `checkpoint`."""


@runtime_checkable
class SupportsReadFile(Protocol):
    """A session whose files can be brought out."""

    def read_file(self, name: str) -> bytes:
        """The content of a regular file below the guest's ``/tmp``, relative to it or absolute; at most ``value_bytes``.

        What a link in the guest leads to is a file of the guest.

        Raises:
            ValueError, TypeError: the name leads out of ``/tmp``.
            GuestError: there is no such file, or it is a directory, pipe or device.
            LimitExceeded: it is larger.
            GuestCrashed, ProtocolViolation: the guest went wrong while it was read.
        """


@runtime_checkable
class SupportsWaiting(Protocol):
    """A session that can wait, opened and unused, until somebody needs one. For pools."""

    def begin(self) -> bool:
        """Its ``session_seconds`` run from now on. False if it did not live through the waiting; it is then to be closed."""


#: What a host hands to a backend for reading values in the same turn.
ReadValues = Mapping[str, Any]
