"""`Limits`: what a session and each of its cells may use. Finite by default; unlimited is spelled ``None``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Final

__all__ = ("PER_CELL", "PER_SESSION", "Limits")

#: Fields that ``exec(limits=...)`` may narrow.
PER_CELL: Final = ("time_seconds", "wall_seconds", "output_bytes", "host_calls", "value_bytes")
#: Fields that are fixed when a session opens.
PER_SESSION: Final = ("memory_mb", "processes", "disk_mb", "session_seconds", "network")

_SECONDS: Final = ("time_seconds", "wall_seconds", "session_seconds")
# Lowest and highest value of each whole-number field. The low ends are what an interpreter needs to run a
# cell at all; the high ends catch a unit mistake (bytes given as megabytes) before it becomes no limit.
_RANGES: Final[dict[str, tuple[int, int]]] = {
    "output_bytes": (0, 1 << 32),
    "host_calls": (0, 1 << 31),
    "value_bytes": (1024, 1 << 32),
    "memory_mb": (16, 1 << 22),
    "processes": (1, 32_768),
    "disk_mb": (0, 1 << 22),
}


class _DefaultInt(int):
    """A whole number nobody wrote: equal to any other, but not a request."""


class _DefaultFloat(float):
    """A number of seconds nobody wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a session. Every field is finite unless the caller writes ``None``.

    Per cell:

    - ``time_seconds``: the guest's turn clock, measured from outside: from a request sent to its turn-ending
      frame, sleep included, waiting for a host call excluded.
    - ``wall_seconds``: the whole cell, host calls included.
    - ``output_bytes``: stdout and stderr together, kept as a head and a tail.
    - ``host_calls``: calls from the guest to host functions and exposed objects.

    Per crossing value: ``value_bytes``.

    Per session:

    - ``memory_mb``: memory of one worker in MiB, a mapped context excluded.
    - ``processes``: tasks, threads included.
    - ``disk_mb``: the writable ``/tmp`` in MiB.
    - ``session_seconds``: from opening.
    - ``network``: ``"none"``. Anything else raises until a backend implements it.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range.
    """

    time_seconds: float | None = _DefaultFloat(10.0)
    wall_seconds: float | None = _DefaultFloat(600.0)
    output_bytes: int | None = _DefaultInt(64 * 1024)
    host_calls: int | None = _DefaultInt(10_000)
    value_bytes: int | None = _DefaultInt(64 * 1024 * 1024)
    memory_mb: int | None = _DefaultInt(512)
    processes: int | None = _DefaultInt(64)
    disk_mb: int | None = _DefaultInt(64)
    session_seconds: float | None = _DefaultFloat(3_600.0)
    network: str = "none"

    def __post_init__(self) -> None:
        for name in _SECONDS:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Limits.{name} must be a number of seconds or None, not {type(value).__name__}")
            if not math.isfinite(value) or not 0 < value <= 10_000_000:
                raise ValueError(
                    f"Limits.{name} must be above 0 and at most 10,000,000 seconds, got {value!r}; write None for no limit"
                )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Limits.{name} must be a whole number or None, not {type(value).__name__}")
            if not low <= value <= high:
                raise ValueError(f"Limits.{name} must be between {low} and {high}, got {value}; write None for no limit")
        if not isinstance(self.network, str):
            raise TypeError(f"Limits.network must be a string, not {type(self.network).__name__}")
        if self.network != "none":
            raise ValueError(
                f"Limits.network must be 'none', got {self.network!r}; no backend implements another network policy yet"
            )

    def narrowed(self, asked: Limits | None) -> Limits:
        """These limits with the per-cell fields of ``asked`` where they are narrower.

        A field that ``asked`` was made without is not a request. A field that is set and *wider* than the
        session's, or that belongs to the session, is refused rather than ignored.

        Raises:
            TypeError: ``asked`` is not a `Limits`.
            ValueError: ``asked`` would widen a limit, or names a per-session one.
        """
        if asked is None:
            return self
        if not isinstance(asked, Limits):
            raise TypeError(f"limits must be a Limits, not {type(asked).__name__}")
        changes: dict[str, Any] = {}
        for field in fields(Limits):
            wanted, have = getattr(asked, field.name), getattr(self, field.name)
            if wanted == have or isinstance(wanted, _DefaultInt | _DefaultFloat):
                continue
            if field.name in PER_SESSION:
                raise ValueError(f"{field.name} is fixed when the session opens; give it to open_repl(limits=...)")
            if wanted is None or (have is not None and wanted > have):
                raise ValueError(f"exec(limits=...) may only narrow: {field.name} is {have} for this session, asked for {wanted}")
            changes[field.name] = wanted
        return replace(self, **changes) if changes else self
