"""The parts a backend rests on, as the backend itself finds them."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import BackendUnavailable
from ..registry import HasParts, load_backend
from .findings import Finding, Status

__all__ = ("examine_parts",)


def examine_parts(name: str) -> Iterator[Finding]:
    """A finding for each part; none for a backend that cannot be imported, which the trial of its sessions reports."""
    try:
        backend = load_backend(name)
    except (BackendUnavailable, ImportError):
        return
    if not isinstance(backend, HasParts):
        return
    for part in backend.parts():
        status = Status.PASS if part.works else Status.FAIL if part.needed else Status.CAUTION
        yield Finding(
            backend=name, layer=part.name, status=status, found=part.found, consequence=part.consequence, remedy=part.remedy
        )
