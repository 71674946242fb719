"""A cell's failure in words: the cell's own frames, with their lines, and nothing of the host."""

from __future__ import annotations

import linecache
import threading
import traceback
from collections.abc import Mapping
from typing import Final

from .cell import CellStopped

__all__ = ("cut", "describe")

_MAX_MESSAGE: Final = 4_000
_MAX_TRACEBACK: Final = 15_000
#: The line cache belongs to the whole process: cells are in it only while a failure is put into words.
_LOCK: Final = threading.Lock()


def cut(text: str, limit: int) -> str:
    """``text``, shortened with a note. Of a cell's own kind of text only the characters are taken."""
    text = str.__str__(text)
    return text if len(text) <= limit else f"{text[:limit]}... [{len(text) - limit} more characters]"


def describe(exc: BaseException, sources: Mapping[str, str]) -> tuple[str, str, str]:
    """Type name, message and traceback. ``sources``: the source of each cell by its name. Runs the cell's own ``__str__``.

    Raises:
        CellStopped: the cell was ended meanwhile.
    """
    try:
        text = _traceback(exc, sources)
        message = str(exc)
    except CellStopped:
        raise
    except BaseException as failed:  # noqa: BLE001 - a cell's __str__ may raise anything
        text, message = "", f"<the exception could not be shown: {type(failed).__name__}>"
    if isinstance(exc, MemoryError) and not message:
        message = "out of memory"
    words = (str(type(exc).__name__)[:200], cut(message, _MAX_MESSAGE), cut(text, _MAX_TRACEBACK))
    type_name, message, text = (word.encode("utf-8", "backslashreplace").decode() for word in words)
    return type_name, message, text


def _traceback(exc: BaseException, sources: Mapping[str, str]) -> str:
    report = traceback.TracebackException(type(exc), exc, exc.__traceback__, lookup_lines=False, compact=True)
    seen: set[int] = set()
    waiting: list[traceback.TracebackException | None] = [report]
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        part.stack[:] = [frame for frame in part.stack if frame.filename in sources]
        waiting += [part.__cause__, part.__context__, *(part.exceptions or ())]
    with _LOCK:
        try:
            for name, source in sources.items():
                linecache.cache[name] = (len(source), None, source.splitlines(True), name)
            return "".join(report.format())
        finally:
            for name in sources:
                linecache.cache.pop(name, None)
