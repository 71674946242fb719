"""A guest's regular expressions over a context, in a child process that can be killed.

``re`` holds the interpreter's lock while it matches: run on the host, one bad pattern would freeze every thread of it.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, Final

from ..context import Context
from ..context import view as _view

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ("SearchProcess",)

_CHILD: Final = Path(__file__).with_name("search_child.py")
_LENGTH: Final = struct.Struct("<Q")
#: What a search may take besides the text: compiled patterns, matches, the interpreter.
_ROOM_BYTES: Final = 512 << 20
#: An answer is JSON in ASCII: at most 12 bytes for a character of the text, and some for the offsets of each match.
_BYTES_PER_CHAR: Final = 12
_ERRORS: Final[dict[str, type[Exception]]] = {
    "error": re.error, "PatternError": re.error, "TypeError": TypeError, "ValueError": ValueError, "IndexError": IndexError,
    "OverflowError": OverflowError,
}  # fmt: skip


class SearchProcess:
    """Searches one context. Started on first use; the text is sent once. `cancel` may come from any thread."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._has_text = False

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a `ContextView` method in the child and wait for its answer.

        Raises:
            re.error, TypeError, ValueError, IndexError: what the method raised.
            RuntimeError: it was cancelled, or ran out of memory.
        """
        request = json.dumps([method, list(args), kwargs]).encode()
        with self._lock:
            child = self._child or self._start()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                if not self._has_text:
                    self._send_text(child.stdin)
                _write(child.stdin, request)
                answer = _read(child.stdout, _BYTES_PER_CHAR * len(self._context) + (64 << 20))
            except OSError:
                answer = None
            if answer is None:
                self._end(child)
                raise RuntimeError("the search ended without an answer; use a simpler pattern")
        status, *rest = json.loads(answer)
        if status == "ok":
            value = rest[0]
            return [tuple(match) for match in value] if method == "find" else value
        raise _ERRORS.get(rest[0], RuntimeError)(rest[1])

    def cancel(self) -> None:
        """Kill the child, if any; a running `call` fails. Never raises."""
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """Kill the child and wait for it. Idempotent."""
        self.cancel()
        with self._lock:
            if self._child is not None:
                self._end(self._child)

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD), str(Path(_view.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/" if Path("/").is_dir() else None,
        )
        self._child = child
        self._has_text = False
        if hasattr(resource, "prlimit"):
            room = _ROOM_BYTES + 10 * len(self._context)
            resource.prlimit(child.pid, resource.RLIMIT_DATA, (room, room))
            resource.prlimit(child.pid, resource.RLIMIT_CORE, (0, 0))
        return child

    def _send_text(self, pipe: IO[bytes]) -> None:
        _write(pipe, self._context.text.encode("utf-8", "surrogatepass"))
        _write(pipe, json.dumps(list(self._context.spans)).encode())
        self._has_text = True

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        self._child = None
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue
        child.wait()


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes], limit: int) -> bytes | None:
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        return None
    data = pipe.read(length)
    return data if len(data) == length else None
