"""`JsonlWriter`: a run as a file of JSON lines, written through as it goes."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .orchestrator.events import CellOutput, Event

__all__ = ("SCHEMA_VERSION", "JsonlWriter")

#: Raised when a reader of the older form could misread a line. New events and new fields do not raise it.
SCHEMA_VERSION: Final = 1


class JsonlWriter:
    """A listener that writes each event as one line, and flushes it, so that a killed run leaves what it did.

    Every line is an object with ``schema`` and the fields of `Event.to_json`. All text is escaped to ASCII: no guest's
    byte reaches a terminal that prints the file. `CellOutput` is left out (``cell_finished`` has the text).

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._file = self.path.open("w", encoding="ascii", newline="\n")

    def __call__(self, event: Event) -> None:
        """Write ``event``."""
        if isinstance(event, CellOutput) or self._file.closed:
            return
        self._file.write(json.dumps({"schema": SCHEMA_VERSION, **event.to_json()}, ensure_ascii=True, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; later events are dropped. Idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
