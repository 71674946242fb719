"""Rebuilding a guest from its journal: the same requests with the same answers, until it has said what it said before."""

from __future__ import annotations

import time
from typing import Final

from .instance import Instance
from .journal import Journal
from .peer import ReplayPeer
from .pool import InstancePool

__all__ = ("RECOVERY_SECONDS", "replay")

#: What a recovery may take; the cell's own limits do not count here.
RECOVERY_SECONDS: Final = 1.9


def replay(instances: InstancePool, journal: Journal, memory_mb: int | None) -> Instance | None:
    """A new instance in the journal's state; None if it cannot be had in time, or came to something else.

    Raises:
        BackendUnavailable: no instance could be made.
    """
    if not journal.complete:
        return None
    instance = instances.take()
    instance.limit_memory(memory_mb)
    until = time.monotonic() + RECOVERY_SECONDS
    for entry in journal:
        peer = ReplayPeer(entry)
        instance.start(entry.request, peer)
        if not peer.done.wait(max(0.0, until - time.monotonic())):
            peer.must_stop = True
            return None
        if not peer.matched:
            return None
    return instance
