"""`CellOutput`: what a cell prints, kept within its limit and shown to the listener."""

from __future__ import annotations

from ...bridge.capture import Capture
from ...results import Stream
from .turn import Turn

__all__ = ("CellOutput",)


class CellOutput:
    """The output of one cell. ``live``: somebody listens; the live view ends where the limit does."""

    def __init__(self, cap: int | None, turn: Turn, *, live: bool) -> None:
        self._capture = Capture(cap)
        self._turn = turn
        self._live = live
        self._room = cap

    def listen(self, stream: Stream, text: str) -> None:
        """Take what the guest wrote. Called inside an engine call."""
        self._capture.add(stream, text.encode("utf-8", "surrogatepass"))
        if self._live and (self._room is None or self._room > 0):
            self._turn.show(stream, text)
            self._room = None if self._room is None else self._room - len(text)

    def text(self, stream: Stream) -> str:
        """The kept part of a stream."""
        return self._capture.text(stream) if self._capture.total else ""

    @property
    def dropped(self) -> int:
        """Bytes that were not kept."""
        return self._capture.dropped

    @property
    def total(self) -> int:
        """Bytes that were written."""
        return self._capture.total
