"""The host's `Context`: where a run's text comes from, and how it gets to guests without a copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final

from .view import ContextView

__all__ = ("CONTEXT_METHODS", "CONTEXT_OPERATORS", "Context", "MemoryFile", "WholeText")

#: What a guest may call on a context that stays on the host.
CONTEXT_METHODS: Final = (
    "chunk", "chunk_documents", "document_lengths", "find", "get_document", "len_chars", "metadata", "num_documents", "page", "slice",
)  # fmt: skip
CONTEXT_OPERATORS: Final = ("bool", "contains", "getitem", "iter", "len")


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A text in a sealed memory file at fixed width, ready to be mapped."""

    fd: int
    chars: int
    width: int
    ascii_only: bool


@dataclass(frozen=True, slots=True)
class WholeText:
    """``bind("P", context.whole)``: the context's text as one ``str`` in the guest."""

    context: Context


class Context(ContextView):
    """A long text on the host, whole and as documents."""

    @classmethod
    def from_text(cls, text: str, *, metadata: dict[str, Any] | None = None) -> Context:
        """A context of one text."""
        return cls(text, (), metadata)

    @classmethod
    def from_documents(
        cls, documents: Iterable[str], *, separator: str = "\n\n---\n\n", metadata: dict[str, Any] | None = None
    ) -> Context:
        """A context of several documents, joined by ``separator`` in the whole text."""
        raise NotImplementedError

    @classmethod
    def from_files(cls, paths: Iterable[str | PathLike[str]], *, encoding: str = "utf-8") -> Context:
        """A context of several text files."""
        raise NotImplementedError

    @property
    def whole(self) -> WholeText:
        """The text itself, for `bind`."""
        return WholeText(self)

    @property
    def text(self) -> str:
        """The whole text."""
        return self._text

    def memory_file(self) -> MemoryFile:
        """The text in a sealed memory file, written once and shared by every session that maps it."""
        raise NotImplementedError
