"""`ContextView`: the algorithms of a context over one ``str``. Standard library only; bundled into guests.

The host's `Context` is a subclass, and a guest that maps the text makes one of these over the mapped ``str``, so that
``ctx.find`` means one thing everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

__all__ = ("ContextView",)

#: Matches or pieces in one answer. Where the context stays on the host, a guest's call must not fill the host's memory.
MAX_ITEMS: Final = 100_000
#: How often the pieces of one answer may repeat the text, for the same reason.
MAX_REPEATS: Final = 4


class ContextView:
    """A long text, whole and as documents. Offsets are characters, ends are exclusive, as in Python slices.

    ``spans`` are the documents' bounds, flat: start, end, start, end, ...; empty means one document, the whole text.
    """

    def __init__(self, text: str, spans: Sequence[int] = (), metadata: dict[str, Any] | None = None) -> None:
        self._text = text
        self._spans = spans
        self._metadata = dict(metadata or {})

    def _as_str(self) -> str:
        """The text for what works on a real ``str`` only: regular expressions."""
        return self._text

    def __len__(self) -> int:
        return len(self._text)

    def __bool__(self) -> bool:
        return bool(self._text)

    def __getitem__(self, key: int | slice) -> str:
        return self._text[key]

    def __contains__(self, part: str) -> bool:
        return part in self._text

    def __iter__(self) -> Iterator[str]:
        """The documents, in order."""
        for index in range(self.num_documents()):
            yield self.get_document(index)

    def __repr__(self) -> str:
        return f"<Context: {len(self._text)} characters, {self.num_documents()} documents>"

    def len_chars(self) -> int:
        """The length of the whole text in characters."""
        return len(self._text)

    def slice(self, start: int, end: int) -> str:
        """The text from ``start`` to ``end``, both clamped to the text; negative means 0."""
        length = len(self._text)
        return self._text[max(0, min(start, length)) : max(0, min(end, length))]

    def find(
        self,
        pattern: str,
        *,
        regex: bool = False,
        max_matches: int = 20,
        case_sensitive: bool = True,
        start: int = 0,
        end: int | None = None,
    ) -> list[tuple[int, int, str]]:
        """Matches as ``(start, end, text)``, at most ``max_matches``, from ``start`` on.

        Literal search by default; ``regex=True`` takes Python's ``re`` syntax. An empty pattern matches nothing.

        Raises:
            ValueError: there are more than `MAX_ITEMS` matches, and that many were asked for.
            re.error: ``pattern`` is no regular expression.
        """
        if not pattern or max_matches <= 0:
            return []
        text = self._text
        stop = len(text) if end is None else max(0, min(end, len(text)))
        found: list[tuple[int, int, str]] = []
        if regex or not case_sensitive:
            compiled = re.compile(pattern if regex else re.escape(pattern), 0 if case_sensitive else re.IGNORECASE)
            for match in compiled.finditer(self._as_str(), max(0, start), stop):
                found.append((match.start(), match.end(), match.group()))
                if len(found) >= max_matches:
                    break
                _check_items(len(found), "matches")
            return found
        at = text.find(pattern, max(0, start), stop)
        while at >= 0 and len(found) < max_matches:
            found.append((at, at + len(pattern), pattern))
            _check_items(len(found), "matches")
            at = text.find(pattern, at + len(pattern), stop)
        return found

    def chunk(self, size: int, overlap: int = 0) -> list[tuple[int, int, str]]:
        """The text in pieces of ``size`` characters as ``(start, end, text)``, each repeating ``overlap`` of the last.

        Raises:
            ValueError: ``size`` or ``overlap`` is out of range, or the pieces would be more than `MAX_ITEMS` or repeat the
                text more than `MAX_REPEATS` times.
        """
        if size <= 0:
            raise ValueError("size must be above 0")
        if not 0 <= overlap < size:
            raise ValueError("overlap must be at least 0 and below size")
        length, step = len(self._text), size - overlap
        # The last piece is the first one that reaches the end of the text.
        starts = range(0, max(1, length - overlap) if length else 0, step)
        _check_items(len(starts), "pieces")
        if len(starts) * min(size, length) > MAX_REPEATS * length + size:
            raise ValueError(f"the pieces would repeat the text more than {MAX_REPEATS} times; use less overlap")
        return [(at, min(length, at + size), self._text[at : at + size]) for at in starts]

    def num_documents(self) -> int:
        """How many documents there are; 1 for a single text."""
        return len(self._spans) // 2 or 1

    def _bounds(self, index: int) -> tuple[int, int]:
        if not self._spans:
            return 0, len(self._text)
        return self._spans[2 * index], self._spans[2 * index + 1]

    def get_document(self, index: int) -> str:
        """Document ``index``, from 0.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= index < self.num_documents():
            raise IndexError(f"there is no document {index}; the context has {self.num_documents()}")
        start, end = self._bounds(index)
        return self._text[start:end]

    def document_lengths(self) -> list[int]:
        """The length of each document in characters."""
        return [end - start for start, end in map(self._bounds, range(self.num_documents()))]

    def chunk_documents(self, docs_per_chunk: int = 10) -> list[tuple[int, int, list[str]]]:
        """The documents in groups as ``(first, end, [texts])``."""
        if docs_per_chunk <= 0:
            raise ValueError("docs_per_chunk must be above 0")
        count = self.num_documents()
        return [
            (
                at,
                min(count, at + docs_per_chunk),
                [self.get_document(index) for index in range(at, min(count, at + docs_per_chunk))],
            )
            for at in range(0, count, docs_per_chunk)
        ]

    def page(self, page_number: int, *, marker_pattern: str = r"<!-- Page (\d+) -->") -> str | None:
        """The text between the marker of a page and the next marker, or None if there is no such page.

        Raises:
            ValueError: ``marker_pattern`` has no group for the page's number.
            re.error: it is no regular expression.
        """
        marker = re.compile(marker_pattern)
        if not marker.groups:
            raise ValueError("marker_pattern must have a group that matches the page's number, as in 'Page (\\d+)'")
        start = None
        for match in marker.finditer(self._as_str()):
            if start is not None:
                return self._text[start : match.start()]
            if _number(match.group(1)) == page_number:
                start = match.end()
        return None if start is None else self._text[start:]

    def metadata(self) -> dict[str, Any]:
        """Length, number of documents, and what the host added (file names, say)."""
        return {"total_length": len(self._text), "num_documents": self.num_documents(), **self._metadata}


def _check_items(count: int, what: str) -> None:
    if count > MAX_ITEMS:
        raise ValueError(f"there are more than {MAX_ITEMS:,} {what}; ask for less at a time")


def _number(text: str | None) -> int | None:
    """A page's number; None where the marker's group matched none, or something else."""
    try:
        return int(text or "")
    except ValueError:
        return None
