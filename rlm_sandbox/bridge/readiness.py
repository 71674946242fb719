"""`Readiness`: which of a guest's descriptors are ready, by one poll object that is kept while the descriptors are the same."""

from __future__ import annotations

import select
from collections.abc import Collection

from .guest import Guest

__all__ = ("Readiness",)


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
        if writing is not self._writing:
            self._poll.modify(self._data_fd, select.POLLIN | select.POLLOUT if writing else select.POLLIN)
            self._writing = writing
        return dict(self._poll.poll(milliseconds))

    def _register(self, guest: Guest, without: Collection[int]) -> None:
        self._guest, self._data, self._data_fd = guest, guest.data, guest.data.fileno()
        self._writing, self._without = False, tuple(without)
        self._poll = select.poll()
        for fd in (self._data_fd, *guest.outputs, guest.control_fd, self._wake_fd):
            if fd not in self._without:
                self._poll.register(fd, select.POLLIN)
