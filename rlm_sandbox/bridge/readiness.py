"""`Readiness`: which of a guest's descriptors are ready, by one poll object that is kept while the descriptors are the same."""

from __future__ import annotations

import select
import time
from collections.abc import Collection
from typing import Final

from ..waiting import is_readable
from .guest import Guest, SharedStream

__all__ = ("Readiness", "becomes_ready")

#: Between two attempts to send what a stream has not taken, where nobody waits for it to take more.
_UNSENT_SECONDS: Final = 0.01


def becomes_ready(guest: Guest, fd: int, seconds: float) -> bool:
    """Wait for one of a guest's descriptors, by which something can be received, for at most so long."""
    stream = guest.stream
    if stream is None:
        return is_readable(fd, max(0.0, seconds))
    shared = guest.data.fileno()
    until = time.monotonic() + seconds
    while True:
        stream.serve()
        if stream.has_data if fd == shared else is_readable(fd):
            return True
        left = until - time.monotonic()
        if left <= 0 or stream.ended:
            return False
        is_readable(shared, min(left, _UNSENT_SECONDS) if stream.unsent else left)


class Readiness:
    """The descriptors of a session's present guest, and its wake-up pipe. Not thread-safe: its session is.

    The kernel looks at descriptors in the order in which they were registered: the data channel comes before the output
    pipes. So if one look finds a frame and no output, nothing was printed before that frame was begun.
    """

    def __init__(self, wake_fd: int) -> None:
        self._wake_fd = wake_fd
        self._guest: Guest | None = None
        self._data: object = None
        self._poll = select.poll()
        self._data_fd = -1
        self._writing = False
        self._without: Collection[int] = ()

    def look(
        self, guest: Guest, milliseconds: int | None, *, writing: bool = False, without: Collection[int] = ()
    ) -> dict[int, int]:
        """Events by descriptor, after at most this long (None: for ever).

        ``writing``: also whether the data channel takes more. ``without``: outputs that have ended, which would be ready for ever.
        """
        if guest is not self._guest or guest.data is not self._data or len(without) != len(self._without):
            self._register(guest, without)
        if guest.stream is not None:
            return self._look_through(guest.stream, milliseconds, writing)
        if writing is not self._writing:
            self._poll.modify(self._data_fd, select.POLLIN | select.POLLOUT if writing else select.POLLIN)
            self._writing = writing
        return dict(self._poll.poll(milliseconds))

    def _look_through(self, stream: SharedStream, milliseconds: int | None, writing: bool) -> dict[int, int]:
        fd = self._data_fd
        unsent = stream.unsent
        if unsent is not self._writing:
            self._poll.modify(fd, select.POLLIN | select.POLLOUT if unsent else select.POLLIN)
            self._writing = unsent
        if stream.has_data or (writing and stream.takes_data):
            milliseconds = 0
        elif milliseconds != 0:
            stream.before_waiting()
        events = dict(self._poll.poll(milliseconds))
        if (fd in events or stream.held) and stream.serve():  # what was passed on before data is found before it
            events = dict(self._poll.poll(0))
        state = (select.POLLIN if stream.has_data else 0) | (select.POLLOUT if writing and stream.takes_data else 0)
        if state:
            events[fd] = state
        else:
            events.pop(fd, None)
        return events

    def _register(self, guest: Guest, without: Collection[int]) -> None:
        self._guest, self._data, self._data_fd = guest, guest.data, guest.data.fileno()
        self._writing, self._without = False, tuple(without)
        self._poll = select.poll()
        for fd in (self._data_fd, *guest.outputs, guest.control_fd, self._wake_fd):
            if fd not in self._without:
                self._poll.register(fd, select.POLLIN)
