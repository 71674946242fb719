"""`BoundContext`: a `Context` as this backend's guests reach it, by host calls, with every call's cost bounded first."""

from __future__ import annotations

import re
from typing import Any, Final

from ..binding import Exposed
from ..context import CONTEXT_METHODS, CONTEXT_OPERATORS, Context
from ..wire.codec import MAX_ELEMENTS
from .search import SearchProcess

__all__ = ("CONTEXT_ERRORS", "BoundContext")

#: What context methods raise keeps its message: the text is the library's own.
CONTEXT_ERRORS: Final[tuple[type[BaseException], ...]] = (TypeError, ValueError, IndexError, OverflowError, re.error)
#: A result's tuples have three elements each.
_MAX_PIECES: Final = MAX_ELEMENTS // 4


class BoundContext:
    """The methods of `Context`, on the host. What a guest could make large is refused before it is made."""

    def __init__(self, context: Context, max_chars: int | None) -> None:
        self._context = context
        self._max_chars = max_chars
        self.search = SearchProcess(context)

    def copy(self) -> BoundContext:
        """The same context with a search process of its own."""
        return BoundContext(self._context, self._max_chars)

    def exposed(self) -> Exposed:
        """This object with the allow-list of a context."""
        return Exposed(self, frozenset(CONTEXT_METHODS), frozenset(), frozenset(CONTEXT_OPERATORS), "Context")

    @staticmethod
    def searches(method: str | None, kwargs: dict[str, Any]) -> bool:
        """True if the call runs a regular expression: then it must not run on the caller's thread."""
        return method == "page" or (method == "find" and (bool(kwargs.get("regex")) or not kwargs.get("case_sensitive", True)))

    def __len__(self) -> int:
        return len(self._context)

    def __bool__(self) -> bool:
        return bool(self._context)

    def __contains__(self, part: Any) -> bool:
        return part in self._context

    def __getitem__(self, key: Any) -> str:
        return self._context[key]

    def __iter__(self) -> Any:
        self._check(self._context.num_documents(), len(self._context))
        return iter(self._context)

    def find(self, pattern: str, **options: Any) -> Any:
        """`Context.find`; regular expressions run in the search process."""
        _need("pattern", pattern, str)
        wanted = options.get("max_matches", 20)
        _need("max_matches", wanted, int)
        self._check(min(wanted, len(self._context)), 0)
        if self.searches("find", options):
            return self.search.call("find", (pattern,), options)
        return self._context.find(pattern, **options)

    def page(self, page_number: int, **options: Any) -> Any:
        """`Context.page`, in the search process."""
        _need("page_number", page_number, int)
        return self.search.call("page", (page_number,), options)

    def chunk(self, size: int, overlap: int = 0) -> Any:
        """`Context.chunk`."""
        _need("size", size, int)
        _need("overlap", overlap, int)
        if size > 0 and 0 <= overlap < size:
            pieces = -(-len(self._context) // (size - overlap))
            self._check(pieces, pieces * min(size, len(self._context)))
        return self._context.chunk(size, overlap)

    def chunk_documents(self, docs_per_chunk: int = 10) -> Any:
        """`Context.chunk_documents`."""
        _need("docs_per_chunk", docs_per_chunk, int)
        self._check(self._context.num_documents(), len(self._context))
        return self._context.chunk_documents(docs_per_chunk)

    def document_lengths(self) -> Any:
        """`Context.document_lengths`."""
        self._check(self._context.num_documents(), 0)
        return self._context.document_lengths()

    def slice(self, start: int, end: int) -> Any:
        """`Context.slice`."""
        return self._context.slice(start, end)

    def get_document(self, index: int) -> Any:
        """`Context.get_document`."""
        return self._context.get_document(index)

    def len_chars(self) -> int:
        """`Context.len_chars`."""
        return self._context.len_chars()

    def num_documents(self) -> int:
        """`Context.num_documents`."""
        return self._context.num_documents()

    def metadata(self) -> Any:
        """`Context.metadata`."""
        return self._context.metadata()

    def _check(self, pieces: int, chars: int) -> None:
        if pieces > _MAX_PIECES:
            raise ValueError(f"the result would have more than {_MAX_PIECES} pieces; ask for fewer or larger ones")
        if self._max_chars is not None and chars > self._max_chars:
            raise ValueError(f"the result would have more than {self._max_chars} characters; ask for a part of the text")


def _need(name: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise TypeError(f"{name} must be {kind.__name__}, not {type(value).__name__}")
