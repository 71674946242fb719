"""Typed options of each backend, for ``open_repl(options=...)``. Frozen data; importing this imports no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ("BackendOptions", "JailOptions", "MontyOptions", "RestrictedOptions")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """Base of every backend's options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JailOptions(BackendOptions):
    """Options of the ``jail`` backend.

    ``isolation``: ``"namespaces"`` is the only level this version offers.
    """

    isolation: Literal["namespaces"] = "namespaces"

    def __post_init__(self) -> None:
        if self.isolation != "namespaces":
            raise ValueError(f"JailOptions.isolation must be 'namespaces', got {self.isolation!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MontyOptions(BackendOptions):
    """Options of the ``monty`` backend.

    - ``max_processes``: worker processes of the pool this session belongs to. More sessions may be open: an idle one
      is parked, its state kept as a dump in the host's memory, until it is used again.
    - ``spare_workers``: processes that wait beyond those: so many for the next sessions, and as many for restoring one.
    - ``confinement``: ``"kernel"`` puts each worker into namespaces of its own, behind a seccomp allow-list, and is not
      available where the kernel does not allow it. ``"language"`` leaves the interpreter of the subset as the only wall
      between the guest and what the host's user may do; say so only where that is enough.
    """

    max_processes: int = 16
    spare_workers: int = 1
    confinement: Literal["kernel", "language"] = "kernel"

    def __post_init__(self) -> None:
        for name, low in (("max_processes", 1), ("spare_workers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"MontyOptions.{name} must be a whole number")
            if not low <= value <= 4096:
                raise ValueError(f"MontyOptions.{name} must be between {low} and 4096, got {value}")
        if self.confinement not in ("kernel", "language"):
            raise ValueError(f"MontyOptions.confinement must be 'kernel' or 'language', got {self.confinement!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RestrictedOptions(BackendOptions):
    """Options of the ``restricted`` backend.

    ``process``: run the policy in a killable guest process, which enforces the limits, instead of in the host's own.
    """

    process: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.process, bool):
            raise TypeError("RestrictedOptions.process must be True or False")
