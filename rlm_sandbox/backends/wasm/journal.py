"""The journal: every request of a session and whatever its guest was told meanwhile, so that it can be run again.

A guest is deterministic: the same instance, given the same requests, answers, times and random numbers, comes to the
same state. So a replay needs nothing else, and can be checked: what the guest says at each suspension and at the end
must be what it said the first time, or the state is not called restored.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ...context import Context

__all__ = ("Entry", "Journal")

#: What the journal of one session may take of the host's memory, in bytes. Beyond it the session is not protected.
MAX_BYTES: Final = 64 << 20
#: A number and its place in a list.
_NUMBER_BYTES: Final = 40
_ENTRY_BYTES: Final = 600


@dataclass(slots=True)
class Entry:
    """One request. ``answers`` are the host's: frames, numbers (times), random bytes, in the order they were given.

    ``room`` is how many bytes it may take. It is counted while the guest runs: one that asks for ever must not fill the
    host's memory with what it was told. Beyond it nothing is kept.
    """

    request: str
    context: Context | None = None
    room: int = MAX_BYTES
    answers: list[str | int | bytes] = field(default_factory=list)
    suspensions: list[int] = field(default_factory=list)
    ended: int = 0
    #: The guest's time, without what it slept: a replay does not sleep.
    seconds: float = 0.0
    slept: float = 0.0
    overflowed: bool = False
    _told: int = 0

    def note_suspension(self, frame: str) -> None:
        """Remember what the guest asked."""
        if self._has_room(_NUMBER_BYTES):
            self.suspensions.append(hash(frame))

    def note(self, answer: str | int | bytes) -> None:
        """Remember what the guest was told."""
        if self._has_room(_NUMBER_BYTES if isinstance(answer, int) else sys.getsizeof(answer)):
            self.answers.append(answer)

    def _has_room(self, size: int) -> bool:
        self._told += size
        if not self.overflowed and self.size > self.room:
            self.overflowed = True
            self.answers.clear()
            self.suspensions.clear()
        return not self.overflowed

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return _ENTRY_BYTES + sys.getsizeof(self.request) + self._told


class _Kept(NamedTuple):
    """An entry, with the guest's time and the bytes of all entries up to its end: asking costs the same after a thousand cells."""

    entry: Entry
    seconds: float
    size: int


class Journal:
    """The entries of one guest's life, in order."""

    def __init__(self) -> None:
        #: One list: what interrupts the host between two steps may not leave it with half an entry.
        self._kept: list[_Kept] = []
        self.complete = True

    def __len__(self) -> int:
        return len(self._kept)

    def entry(self, position: int) -> Entry | None:
        """The entry at a position, None if there is none (any more)."""
        try:
            return self._kept[position].entry
        except IndexError:
            return None

    def _seconds(self, position: int) -> float:
        return self._kept[position - 1].seconds if position else 0.0

    def _size(self) -> int:
        return self._kept[-1].size if self._kept else 0

    def seconds_since(self, position: int) -> float:
        """What the entries from a position on took the guest."""
        return self._seconds(len(self._kept)) - self._seconds(position)

    @property
    def room(self) -> int:
        """How many bytes the next entry may take."""
        return max(0, MAX_BYTES - self._size())

    def drop_since(self, position: int) -> None:
        """Forget the entries from a position on: what they did is undone."""
        del self._kept[position:]

    def add(self, entry: Entry) -> None:
        """Take a request that has ended. One that is too large makes the journal incomplete, and empties it."""
        if not self.complete:
            return
        if entry.overflowed or entry.size > self.room:
            self.complete = False
            self.drop_since(0)
            return
        self._kept.append(_Kept(entry, self._seconds(len(self._kept)) + entry.seconds, self._size() + entry.size))
