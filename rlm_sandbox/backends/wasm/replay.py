"""Rebuilding a guest from its journal: the same requests with the same answers, until it has said what it said before.

A replay computes what the cells computed, so it takes as long. Where that would be too long, a *follower* does it ahead of
need: a second instance that runs the journal in the background, while the session waits for its next cell. It is behind by
what was added since, and a recovery runs only that. Nothing of the guest's state is judged or copied, so there is no value
that it could get wrong; it costs the cells' time once more, and an instance's memory.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Final

from ...errors import BackendUnavailable
from ...waiting import wait_until
from .cell_threads import run_in_cell_thread
from .idle import IDLE_SECONDS
from .instance import Instance
from .journal import Journal
from .peer import ReplayPeer
from .pool import InstancePool

__all__ = ("RECOVERY_SECONDS", "Replay")

#: What a recovery may take; the cells' own limits do not count here.
RECOVERY_SECONDS: Final = 1.9
#: Once more than this is to be run again, by time or by number, a follower is made as soon as the session is idle, and from then
#: on runs every cell in the next idle moment: so a recovery takes as long after the hundredth cell as after the tenth.
_FOLLOW_SECONDS: Final = 0.1
_FOLLOW_ENTRIES: Final = 8
#: Beyond this it does not wait for that.
_PRESSING_SECONDS: Final = 0.5
_PRESSING_ENTRIES: Final = 4_000
#: A machine may be this much slower at a replay than it was the first time.
_SLACK: Final = 1.5


class Replay:
    """The recovery of one session. Its methods are called by the session's one caller; the follower has a thread."""

    def __init__(self, instances: InstancePool, memory_mb: int | None) -> None:
        self._instances = instances
        self._memory_mb = memory_mb
        self.journal = Journal()
        self.busy_until = 0.0
        self._follower: _Follower | None = None
        self._asked = False
        #: What is to be run again is too much to wait for an idle moment.
        self._pressing = False
        self._closed = False
        #: The idle worker starts followers, too.
        self._lock = threading.Lock()

    @property
    def protected(self) -> bool:
        """Whether the state of now can be had again in time."""
        return self.journal.complete and self.journal.seconds_since(self._followed()) * _SLACK <= RECOVERY_SECONDS

    def cell_begins(self) -> None:
        """Nothing is done in the background while a cell runs, if it can wait."""
        if not self._pressing:
            self.busy_until = math.inf

    def follow(self) -> None:
        """A request ended: have the follower catch up, if there is enough for it to do. Nothing is made or waited for here."""
        follower = self._follower
        follows = follower is not None and not follower.failed
        if self._behind(_PRESSING_SECONDS, _PRESSING_ENTRIES):
            if follows:
                self._catch_up()
            else:
                self._pressing, self.busy_until = True, 0.0
                self._ask()
        elif not self._pressing:
            self.busy_until = time.monotonic() + IDLE_SECONDS
            if self._behind(_FOLLOW_SECONDS, 0 if follows else _FOLLOW_ENTRIES):
                self._ask()

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self._instances.idle.ask(self)

    def when_idle(self) -> None:
        """On the idle worker's thread."""
        self._asked = self._pressing = False
        self._catch_up()

    def _behind(self, seconds: float, entries: int) -> bool:
        journal, position = self.journal, self._followed()
        return journal.complete and (len(journal) - position > entries or journal.seconds_since(position) > seconds)

    def _catch_up(self) -> None:
        with self._lock:
            if self._closed or not self.journal.complete:
                return
            try:
                if self._follower is None or self._follower.failed:
                    self._follower = _Follower(self._new_instance(), self.journal)
                self._follower.catch_up()
            except BackendUnavailable:
                self._follower = None  # without one a recovery takes longer, and says so

    def recover(self) -> Instance | None:
        """An instance in the journal's state, which from now on has no follower; None if it cannot be had in time, or came to something else.

        Raises:
            BackendUnavailable: no instance could be made.
        """
        with self._lock:
            follower, self._follower = self._follower, None
        if not self.journal.complete:
            return None
        if follower is None or follower.failed:
            follower = _Follower(self._new_instance(), self.journal)
        follower.catch_up()
        return follower.finish(RECOVERY_SECONDS)

    def drop_since(self, position: int) -> None:
        """Take back the entries from a position on."""
        with self._lock:
            self._stop_follower()  # it may have run some of them already
            self.journal.drop_since(position)

    def forget(self) -> None:
        """Begin a new journal."""
        with self._lock:
            self._stop_follower()
            self.journal = Journal()

    def close(self) -> None:
        """End the follower; there will be no other."""
        with self._lock:
            self._closed = True
            self._stop_follower()

    def _stop_follower(self) -> None:
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.stop()

    def _followed(self) -> int:
        """How many entries need not be run any more at a recovery."""
        follower = self._follower
        return 0 if follower is None or follower.failed else follower.position

    def _new_instance(self) -> Instance:
        instance = self._instances.take_bare()
        instance.limit_memory(self._memory_mb)
        return instance


class _Follower:
    """An instance that runs a journal. ``position`` is how many entries it has run."""

    def __init__(self, instance: Instance, journal: Journal) -> None:
        self.position = 0
        self.failed = False
        self._instance = instance
        self._journal = journal
        self._lock = threading.Lock()
        self._running = False
        self._idle = threading.Event()
        self._idle.set()
        self._peer: ReplayPeer | None = None

    def catch_up(self) -> None:
        """Run what is new, on a thread of its own, if that is not under way."""
        with self._lock:
            if self._running or self.failed or self.position >= len(self._journal):
                return
            self._running = True
            self._idle.clear()
        run_in_cell_thread(self._run)

    def finish(self, seconds: float) -> Instance | None:
        """The instance when it has run everything; None, and its end, if that takes too long or it failed."""
        until = time.monotonic() + seconds
        while not self.failed:
            if not wait_until(self._idle.wait, until - time.monotonic()):
                break
            if self.position == len(self._journal):
                return None if self.failed else self._instance
            self.catch_up()  # more was added while it ran
        self.stop()
        return None

    def stop(self) -> None:
        """End it wherever it is."""
        self.failed = True
        peer = self._peer
        if peer is not None:
            peer.must_stop = True
        self._instance.discard()

    def _run(self) -> None:
        while True:
            with self._lock:
                entry = None if self.failed else self._journal.entry(self.position)
                if entry is None:
                    self._running = False
                    self._idle.set()
                    return
            self._peer = peer = ReplayPeer(entry)
            if self.failed:  # stopped just now
                peer.must_stop = True
            self._instance.run(entry.request, peer)
            self._peer = None
            if peer.matched:
                self.position += 1
            else:
                self.failed = True
