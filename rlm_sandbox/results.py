"""What a cell came to: `ExecResult` and its parts. Plain frozen data, decided by the host, never by guest text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ("ExecResult", "LimitHit", "Opaque", "Outcome", "OutputChunk", "State", "Stream", "Usage")

Outcome = Literal["ok", "error", "limit", "interrupted", "crashed", "violation"]
State = Literal["kept", "restored", "lost"]
Stream = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class Opaque:
    """A guest value that is not plain data: its type's name and a capped repr, both the guest's own words."""

    type_name: str
    repr: str


@dataclass(frozen=True, slots=True)
class LimitHit:
    """Which limit ended a cell. ``source`` says who measured it: the kernel, the host, or the guest's word."""

    kind: str
    limit: float
    observed: float | None
    source: Literal["kernel", "host", "guest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the cell used. A field is None unless it was measured outside the guest.

    ``time_seconds`` is the turn clock, ``wall_seconds`` the whole cell, ``cpu_seconds`` the worker's CPU time in
    this cell, ``memory_mb`` the worker's peak resident size in MiB, ``output_bytes`` what the guest wrote,
    ``host_calls`` the calls it made.
    """

    time_seconds: float | None = None
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    memory_mb: float | None = None
    output_bytes: int | None = None
    host_calls: int | None = None


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """A piece of output as it appears, for ``on_output``. ``text`` is raw: who renders it makes it inert."""

    stream: Stream
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """The result of one cell.

    - ``outcome``: ``ok``, ``error`` (the cell raised), ``limit``, ``interrupted``, ``crashed``, ``violation``.
    - ``stdout``, ``stderr``: head and tail of what was written; ``dropped_bytes`` counts what lay between.
    - ``value``: repr of the last expression, or None.
    - ``error``: None or ``"Type: message"``; ``traceback``: guest frames only.
    - ``limit``: None, or the limit that ended the cell.
    - ``state``: ``kept``; ``restored`` (names and heap as before this cell); ``lost`` (the session is alive and
      empty, bindings and setup applied again), and then ``lost_names`` says what went.
    - ``read``: the values asked for with ``exec(..., read=...)``; a name that is not there is absent.
    - ``protected``: the cell ran with a recovery point behind it. False with ``recovery=False``, and when the
      recovery point had to be dropped (memory pressure).
    """

    outcome: Outcome
    stdout: str = ""
    stderr: str = ""
    value: str | None = None
    error: str | None = None
    traceback: str | None = None
    limit: LimitHit | None = None
    state: State = "kept"
    lost_names: tuple[str, ...] = ()
    dropped_bytes: int = 0
    read: Mapping[str, Any] = field(default_factory=dict)
    usage: Usage = Usage()
    protected: bool = False

    @property
    def ok(self) -> bool:
        """True when the cell ran to its end without raising."""
        return self.outcome == "ok"
