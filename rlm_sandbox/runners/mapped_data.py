"""Mapped bytes as what a cell works with: arrays and tables of packages that the session was opened with."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ("data_value",)


def data_value(kind: str, data: bytes, manifest: dict[str, Any]) -> Any:
    """The value of a `DataContext`. Raises ImportError if its package is not there."""
    if kind == "bytes":
        return data
    if kind == "array":
        return _array(_package("numpy"), data, manifest).reshape(manifest["shape"])
    if kind == "dataframe":
        return _dataframe(data, manifest)
    raise ValueError(f"data of kind {kind!r} is not known here")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise ImportError(f"this data needs {name} in the guest; open the session with packages=({name!r},)") from exc


def _array(numpy: Any, data: bytes, where: dict[str, Any]) -> Any:
    kind = numpy.dtype(where["dtype"])
    return numpy.frombuffer(data, kind, where["size"] // kind.itemsize if kind.itemsize else 0, where["offset"])


def _dataframe(data: bytes, manifest: dict[str, Any]) -> Any:
    pandas = _package("pandas")
    numpy = _package("numpy")
    columns = {}
    for column in manifest["columns"]:
        texts = column["dtype"] == "text"
        columns[column["name"]] = _texts(data, column, manifest["rows"]) if texts else _array(numpy, data, column)
    index = pandas.RangeIndex(manifest["rows"])
    # Each column stays the block it is: put together they would be copied.
    return pandas.DataFrame(columns, index=index, copy=False)


def _texts(data: bytes, column: dict[str, Any], rows: int) -> list[str | None]:
    ends = memoryview(data)[column["ends"] : column["ends"] + 8 * rows].cast("q")
    found: list[str | None] = []
    start, base = 0, column["offset"]
    for end in ends:
        if end < 0:
            found.append(None)
            continue
        found.append(data[base + start : base + end].decode("utf-8", "surrogatepass"))
        start = end
    return found
