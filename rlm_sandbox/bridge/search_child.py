"""A child process that runs a guest's regular expressions over a context's text. Standard library only.

Run as a file, with the path of `context/view.py` as its argument. It reads requests from standard input and answers
on standard output, each a length (8 bytes, little-endian) and UTF-8: first the text and, as JSON, its document bounds;
then one JSON list ``[method, args, kwargs]`` after another, each answered by ``["ok", value]`` or
``["error", type name, message]``. The parent kills it when the time is up.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from typing import Any, BinaryIO

LENGTH = struct.Struct("<Q")
METHODS = frozenset({"find", "page"})


def read_block(stream: BinaryIO) -> bytes | None:
    """One block, or None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


def answer(view: Any, request: bytes) -> list[Any]:
    method, args, kwargs = json.loads(request)
    if method not in METHODS:
        return ["error", "AttributeError", f"there is no method {method}"]
    try:
        return ["ok", getattr(view, method)(*args, **kwargs)]
    except Exception as exc:  # noqa: BLE001 - whatever the search raises is its answer
        return ["error", type(exc).__name__, str(exc)[:500]]


def main() -> None:
    spec = importlib.util.spec_from_file_location("view", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    text, spans = read_block(source), read_block(source)
    if text is None or spans is None:
        return
    view = module.ContextView(text.decode("utf-8", "surrogatepass"), json.loads(spans))
    del text
    while (request := read_block(source)) is not None:
        data = json.dumps(answer(view, request)).encode()
        sink.write(LENGTH.pack(len(data)))
        sink.write(data)
        sink.flush()


if __name__ == "__main__":
    main()
