"""Typed options of each backend, for ``open_repl(options=...)``. Frozen data; importing this imports no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ("BackendOptions", "JailOptions", "MontyOptions")


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

    ``max_processes``: worker processes of the pool this session belongs to; each open session owns one.
    """

    max_processes: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.max_processes, bool) or not isinstance(self.max_processes, int):
            raise TypeError("MontyOptions.max_processes must be a whole number")
        if not 1 <= self.max_processes <= 4096:
            raise ValueError(f"MontyOptions.max_processes must be between 1 and 4096, got {self.max_processes}")
