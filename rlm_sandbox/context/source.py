"""The host's `Context`: where a run's text comes from, and how it gets to guests without a copy."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from .stored import MemoryFile, store_text
from .view import ContextView

__all__ = ("CONTEXT_METHODS", "CONTEXT_OPERATORS", "Context", "MemoryFile", "WholeText")

#: What a guest may call on a context that stays on the host.
CONTEXT_METHODS: Final = (
    "chunk", "chunk_documents", "document_lengths", "find", "get_document", "len_chars", "metadata", "num_documents", "page", "slice",
)  # fmt: skip
CONTEXT_OPERATORS: Final = ("bool", "contains", "getitem", "iter", "len")

_SEPARATOR: Final = "\n\n---\n\n"


@dataclass(frozen=True, slots=True)
class WholeText:
    """``bind("P", context.whole)``: the context's text as one ``str`` in the guest."""

    context: Context


class Context(ContextView):
    """A long text on the host, whole and as documents. Immutable; may be shared by sessions and threads."""

    def __init__(self, text: str, spans: Sequence[int] = (), metadata: dict[str, Any] | None = None) -> None:
        if not isinstance(text, str):
            raise TypeError(f"a context's text must be a str, not {type(text).__name__}; decode bytes first")
        super().__init__(text, spans, metadata)
        self._lock = threading.Lock()
        self._stored: MemoryFile | None = None

    @classmethod
    def from_text(cls, text: str, *, metadata: dict[str, Any] | None = None) -> Context:
        """A context of one text."""
        return cls(text, (), metadata)

    @classmethod
    def from_documents(
        cls, documents: Iterable[str], *, separator: str = _SEPARATOR, metadata: dict[str, Any] | None = None
    ) -> Context:
        """A context of several documents, joined by ``separator`` in the whole text.

        Raises:
            TypeError: ``documents`` is one ``str``, or holds something else than ``str``.
            ValueError: there is none.
        """
        if isinstance(documents, str):
            raise TypeError("from_documents takes several texts, not one str; use from_text")
        texts = list(documents)
        if not texts:
            raise ValueError("there are no documents; give at least one")
        spans = array("Q")
        at = 0
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"document {index} is a {type(text).__name__}, not a str; decode bytes first")
            spans.extend((at, at + len(text)))
            at += len(text) + len(separator)
        return cls(separator.join(texts), spans, metadata)

    @classmethod
    def from_files(cls, paths: Iterable[str | PathLike[str]], *, encoding: str = "utf-8") -> Context:
        """A context of several text files, one document each, characters and line ends as they stand.

        ``metadata()["files"]`` has their names without directories: a host's paths never reach a guest.

        Raises:
            OSError: a file cannot be read; the subclass is the system's (`FileNotFoundError`, ...).
            ValueError: a file is empty or is no text in ``encoding``; or there is none; or ``encoding`` is unknown.
        """
        if isinstance(paths, str | PathLike):
            raise TypeError("from_files takes several paths, not one; write [path]")
        files = [Path(path) for path in paths]
        if not files:
            raise ValueError("there are no files; give at least one")
        documents = [_read_text(path, encoding) for path in files]
        return cls.from_documents(documents, metadata={"files": [path.name for path in files]})

    @property
    def whole(self) -> WholeText:
        """The text itself, for `bind`."""
        return WholeText(self)

    @property
    def text(self) -> str:
        """The whole text."""
        return self._text

    @property
    def spans(self) -> Sequence[int]:
        """The documents' bounds, flat: start, end, start, end, ...; empty for a single text. Do not change."""
        return self._spans

    @property
    def added_metadata(self) -> dict[str, Any]:
        """A copy of what the host added to `metadata`."""
        return dict(self._metadata)

    def memory_file(self) -> MemoryFile:
        """The text in a sealed memory file, written on the first call and shared by every session that maps it.

        The descriptor belongs to this context, which closes it when it is garbage: keep the context while a session
        attaches, and never close it.

        Raises:
            OSError: there is no memory for it, or the machine has no memory files.
        """
        with self._lock:
            if self._stored is None:
                self._stored = store_text(self._text)
                weakref.finalize(self, os.close, self._stored.fd)
            return self._stored


def _read_text(path: Path, encoding: str) -> str:
    shown = repr(str(path))  # a file name may hold control characters
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{shown} is a directory; name the files in it")
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):  # a pipe is what a shell's <(command) is
            raise OSError(f"{shown} is not a regular file; give a text file")
        data = path.read_bytes()
    except OSError as exc:
        if exc.errno is None:
            raise
        raise type(exc)(f"cannot read {shown}: {os.strerror(exc.errno)}; check the path and its permissions") from None
    except ValueError:  # a NUL in the path
        raise ValueError(f"cannot read {shown}: no path has a NUL character; check the path") from None
    if not data:
        raise ValueError(f"{shown} is empty; leave it out or give a file with text")
    try:
        text = data.decode(encoding)
    except LookupError:
        raise ValueError(f"unknown encoding {encoding!r}; try 'utf-8'") from None
    except UnicodeDecodeError as exc:
        raise ValueError(
            f"{shown} is not {encoding} text (byte {exc.start:,} does not fit); convert it to text, or give its encoding"
        ) from None
    if "\0" in text:
        raise ValueError(f"{shown} is a binary file (it holds NUL characters); convert it to text")
    return text.removeprefix("\ufeff")
