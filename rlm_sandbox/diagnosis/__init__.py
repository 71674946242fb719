"""What works on this machine, found by trying it: the mechanisms in throw-away processes, the backends in sessions."""

from __future__ import annotations

from .findings import Finding, Status

__all__ = ("Finding", "Status")
