"""The host's `Context`: where a run's text comes from, and how it gets to guests without a copy."""

from __future__ import annotations

import codecs
import os
import stat
import sys
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, cast

from .filed import StoredText
from .stored import MemoryFile, TextWriter, store_text
from .view import ContextView

__all__ = ("CONTEXT_METHODS", "CONTEXT_OPERATORS", "Context", "MemoryFile", "WholeText")

#: What a guest may call on a context that stays on the host.
CONTEXT_METHODS: Final = (
    "chunk", "chunk_documents", "document_lengths", "find", "get_document", "len_chars", "metadata", "num_documents", "page", "slice",
)  # fmt: skip
CONTEXT_OPERATORS: Final = ("bool", "contains", "getitem", "iter", "len")

#: Files of this size together are stored while they are read. Below it the text is held by the host, as any other.
_STREAMED_BYTES: Final = 16 << 20
_READ_BYTES: Final = 1 << 20
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
    def _of_stored(cls, stored: MemoryFile, spans: Sequence[int], metadata: dict[str, Any]) -> Context:
        """A context whose text is in its file only; the host reads the parts it needs from there."""
        context = cls.__new__(cls)
        ContextView.__init__(context, cast("str", StoredText(stored)), spans, metadata)
        context._lock = threading.Lock()
        context._keep(stored)
        return context

    def _keep(self, stored: MemoryFile) -> None:
        self._stored = stored
        weakref.finalize(self, os.close, stored.fd)

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
        metadata: dict[str, Any] = {"files": [path.name for path in files]}
        size = sum(_file_size(path) for path in files)
        if sys.platform == "linux" and size >= _STREAMED_BYTES:
            return cls._stored_files(files, encoding, size, metadata)
        return cls.from_documents([_read_text(path, encoding) for path in files], metadata=metadata)

    @classmethod
    def _stored_files(cls, files: Sequence[Path], encoding: str, size: int, metadata: dict[str, Any]) -> Context:
        """The files written to where sessions map them from, piece by piece: the host never holds the text."""
        spans = array("Q")
        writer = TextWriter(size)
        try:
            for index, path in enumerate(files):
                if index:
                    writer.write(_SEPARATOR)
                start = writer.chars
                for piece in _text_pieces(path, encoding):
                    writer.write(piece)
                spans.extend((start, writer.chars))
            stored = writer.finish()
        except BaseException:
            writer.close()
            raise
        return cls._of_stored(stored, spans, metadata)

    @property
    def whole(self) -> WholeText:
        """The text itself, for `bind`."""
        return WholeText(self)

    @property
    def text(self) -> str:
        """The whole text. Of a context of large files it is read into the host's memory on the first call, and kept."""
        return self._as_str()

    def _as_str(self) -> str:
        if isinstance(self._text, StoredText):
            self._text = self._text.load()
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
        """The text in a sealed file, written on the first call and shared by every session that maps it.

        It is a memory file, or a private file on disk where the text would take more than half of the memory available.

        The descriptor belongs to this context, which closes it when it is garbage: keep the context while a session
        attaches, and never close it.

        Raises:
            OSError: there is no room for it, or the machine has no memory files.
        """
        with self._lock:
            if self._stored is None:
                self._keep(store_text(self._text))
            assert self._stored is not None
            return self._stored


def _file_size(path: Path) -> int:
    """Bytes in a file; a pipe may turn out to be large. 0 for what cannot be read, which is told later."""
    try:
        found = path.stat()
        return _STREAMED_BYTES if stat.S_ISFIFO(found.st_mode) else found.st_size
    except (OSError, ValueError):
        return 0


def _read_text(path: Path, encoding: str) -> str:
    return "".join(_text_pieces(path, encoding))


def _text_pieces(path: Path, encoding: str) -> Iterator[str]:
    """The text of a file in pieces, without a byte-order mark. Errors name the file and what to do."""
    shown = repr(str(path))  # a file name may hold control characters
    decoder = _decoder(encoding)
    read = 0
    begun = False
    for data in _byte_pieces(path, shown):
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as exc:
            # What the decoder kept from before comes first in what it was working on.
            at = read - (len(exc.object) - len(data)) + exc.start
            raise ValueError(
                f"{shown} is not {encoding} text (byte {at:,} does not fit); convert it to text, or give its encoding"
            ) from None
        if not data and not read:
            raise ValueError(f"{shown} is empty; leave it out or give a file with text")
        read += len(data)
        if "\0" in text:
            raise ValueError(f"{shown} is a binary file (it holds NUL characters); convert it to text")
        if text:
            yield text if begun else text.removeprefix("\ufeff")
            begun = True


def _decoder(encoding: str) -> codecs.IncrementalDecoder:
    try:
        b"".decode(encoding)  # refuses codecs that are no text encodings
        return codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise ValueError(f"unknown encoding {encoding!r}; try 'utf-8'") from None


def _byte_pieces(path: Path, shown: str) -> Iterator[bytes]:
    """The bytes of a file in pieces; an empty one at its end."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{shown} is a directory; name the files in it")
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):  # a pipe is what a shell's <(command) is
            raise OSError(f"{shown} is not a regular file; give a text file")
        with path.open("rb", buffering=0) as file:
            while data := file.read(_READ_BYTES):
                yield data
    except OSError as exc:
        if exc.errno is None:
            raise
        raise type(exc)(f"cannot read {shown}: {os.strerror(exc.errno)}; check the path and its permissions") from None
    except ValueError:  # a NUL in the path
        raise ValueError(f"cannot read {shown}: no path has a NUL character; check the path") from None
    yield b""
