"""`DataContext`: bytes, arrays and tables that sessions map, as `Context` is for text. No package is imported for it."""

from __future__ import annotations

import io
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final

from .backing import Backing
from .stored import MemoryFile

__all__ = ("DataContext",)

#: Columns begin at multiples of this, as Arrow's do: vector instructions like it.
_ALIGN: Final = 64
_SLICE_BYTES: Final = 1 << 24
#: numpy's kinds whose values are their bytes: bool, integers, floats, complex, times.
_PLAIN_KINDS: Final = "biufcmM"
_MAX_COLUMNS: Final = 10_000


class _Writer(io.RawIOBase):
    """A file object over a `Backing`, for what writes files."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _SLICE_BYTES):
            piece = view[start : start + _SLICE_BYTES]
            self._backing.write(piece, self.size)
            self.size += len(piece)
        return len(view)

    def align(self) -> int:
        """Go on at a multiple of `_ALIGN`; where that is."""
        self.size += -self.size % _ALIGN
        return self.size


class DataContext:
    """Data that stays where it is and is mapped, read-only, into each session it is bound in. Made by one of its constructors.

    In the guest the name is a ``bytes``, a ``numpy.ndarray`` or a ``pandas.DataFrame``; for the last two the session must
    have been opened with ``packages=`` naming the package. Only guests that map contexts can have it: `bind`
    raises `TypeError` on other backends.
    """

    def __init__(self, kind: str, manifest: dict[str, Any], file: MemoryFile) -> None:
        """Use a constructor such as `from_bytes`."""
        self.kind: Final = kind
        self.manifest: Final = manifest
        self._file = file
        weakref.finalize(self, os.close, file.fd)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> DataContext:
        """Bytes, which a guest sees as ``bytes``.

        Raises:
            TypeError: it is something else.
            OSError: there is no room for it.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"from_bytes takes bytes, not {type(data).__name__}")
        size = memoryview(data).nbytes
        return cls._written("bytes", {}, size, lambda writer, _: writer.write(data))

    @classmethod
    def from_array(cls, array: Any) -> DataContext:
        """A ``numpy.ndarray`` of numbers, booleans or times; a guest sees one that is read-only.

        Raises:
            TypeError: it is something else, or holds objects.
            OSError: there is no room for it.
        """
        if type(array).__module__.partition(".")[0] != "numpy" or not hasattr(array, "dtype"):
            raise TypeError(f"from_array takes a numpy array, not {type(array).__name__}")

        def write(writer: _Writer, manifest: dict[str, Any]) -> None:
            manifest |= _put_array(writer, array, "the array")
            manifest["shape"] = list(array.shape)

        return cls._written("array", {}, int(array.nbytes), write)

    @classmethod
    def from_dataframe(cls, frame: Any) -> DataContext:
        """A ``pandas.DataFrame`` (of an Arrow table: ``table.to_pandas()``). Columns of numbers, booleans and times are mapped; texts become new objects in the guest.

        Raises:
            TypeError: it is something else; or its index is not a range; or a column has other values than those.
            ValueError: it has too many columns, or two of one name.
            OSError: there is no room for it.
        """
        if type(frame).__module__.partition(".")[0] != "pandas" or not hasattr(frame, "columns"):
            raise TypeError(f"from_dataframe takes a pandas DataFrame, not {type(frame).__name__}")
        names = list(frame.columns)
        if not all(type(name) is str for name in names) or len(set(names)) != len(names):
            raise ValueError("the columns of a DataFrame need names that are texts, each once; rename them")
        if len(names) > _MAX_COLUMNS:
            raise ValueError(f"a DataFrame of more than {_MAX_COLUMNS:,} columns cannot be bound; bind an array")
        if type(frame.index).__name__ != "RangeIndex" or (frame.index.start, frame.index.step) != (0, 1):
            raise TypeError("only a DataFrame whose index counts from 0 can be bound; use frame.reset_index()")

        def write(writer: _Writer, manifest: dict[str, Any]) -> None:
            manifest["rows"] = len(frame)
            manifest["columns"] = [{"name": name, **_put_column(writer, frame[name], name)} for name in names]

        return cls._written("dataframe", {}, int(frame.memory_usage(index=False).sum()), write)

    @classmethod
    def _written(
        cls, kind: str, manifest: dict[str, Any], expected: int, write: Callable[[_Writer, dict[str, Any]], object]
    ) -> DataContext:
        backing = Backing(expected)
        try:
            writer = _Writer(backing)
            write(writer, manifest)
            size = writer.size
            # One byte more at least: a ``bytes`` ends with a NUL beyond its length.
            fd = backing.seal(-(-(size + 1) // mmap.PAGESIZE) * mmap.PAGESIZE)
        except BaseException:
            backing.close()
            raise
        return cls(kind, manifest, MemoryFile(fd, size, 1, False, backing.in_memory))

    def __len__(self) -> int:
        """Its size in bytes."""
        return self._file.chars

    def __repr__(self) -> str:
        return f"<DataContext: {self.kind}, {len(self)} bytes>"

    def memory_file(self) -> MemoryFile:
        """The sealed file with the data. Its descriptor belongs to this object."""
        return self._file


def _put_array(writer: _Writer, array: Any, what: str) -> dict[str, Any]:
    """The values of an array, and where they are."""
    if array.dtype.kind not in _PLAIN_KINDS:
        raise TypeError(
            f"{what} has values of dtype {array.dtype}, which cannot be mapped; convert it to numbers, booleans or times"
        )
    if not array.flags.c_contiguous:
        array = array.copy(order="C")
    offset = writer.align()
    writer.write(array.reshape(-1).view("u1"))
    return {"dtype": array.dtype.str, "offset": offset, "size": int(array.nbytes)}


def _put_column(writer: _Writer, column: Any, name: str) -> dict[str, Any]:
    if getattr(column.dtype, "kind", "") in _PLAIN_KINDS and type(column.dtype).__module__.partition(".")[0] == "numpy":
        return _put_array(writer, column.to_numpy(), f"column {name!r}")
    values = column.tolist()
    texts = [value if type(value) is str else None for value in values]
    # pandas' own word for nothing differs between its versions and dtypes; all of them are unequal to themselves or have no truth.
    if any(text is None and not _is_nothing(value) for text, value in zip(texts, values, strict=True)):
        raise TypeError(
            f"column {name!r} of dtype {column.dtype} has values that are neither numbers, times nor texts; convert it, or leave it out"
        )
    ends, end = [], 0
    offset = writer.align()
    for text in texts:
        if text is not None:
            end += writer.write(text.encode("utf-8", "surrogatepass"))
        ends.append(-1 if text is None else end)
    place = writer.align()
    for start in range(0, len(ends), 1 << 16):
        writer.write(b"".join([value.to_bytes(8, sys.byteorder, signed=True) for value in ends[start : start + (1 << 16)]]))
    return {"dtype": "text", "offset": offset, "size": end, "ends": place}


def _is_nothing(value: Any) -> bool:
    if value is None:
        return True
    try:
        return bool(value != value)
    except TypeError:  # pandas.NA
        return True
