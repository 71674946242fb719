"""The guest of the ``wasm`` backend: a `GuestSession` whose frames are arguments and results of component functions.

This module runs once when the component is built; what it leaves in memory is the state every session starts from.
Nothing can be imported later, so the whole allow-list is imported here.
"""

from __future__ import annotations

import gc
import importlib
import io
import pkgutil
import random
import sys
from typing import Any, Final

import wit_world

from ..wire.codec import Attachment
from ..wire.messages import FRAME_OVERHEAD, BindText, Message, dump_message
from ..wire.strings import dump_string, load_string, unpack_text
from . import wasm_shims
from .output import CellOutput
from .session import GuestSession
from .wasm_loop import LoopCalls, install
from .wasm_modules import MODULES, PACKAGES, PRIVATE

__all__ = ("WitWorld",)

_NO_CAP: Final = 1 << 40
#: The engine lets 128 MiB go from the guest to the host in one call, counted as UTF-8 or twice as much.
MAX_FRAME_CHARS: Final = 100_000_000
#: What goes out in one call, however much is written at once: the host drops what is too much while it comes.
_PIECE_BYTES: Final = 256 * 1024
#: Writes of a cell that go out at once, and how many later ones go out together.
_WRITTEN_THROUGH: Final = 256
_WRITES_AT_ONCE: Final = 32


class _HostStream(io.RawIOBase):
    """A descriptor of ours: what is written to it goes to the host."""

    def __init__(self, stream: int) -> None:
        super().__init__()
        self._stream = stream

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream

    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as view:
            start = 0
            while start < len(view):
                end = start + _PIECE_BYTES
                if end < len(view):  # not through a character
                    end -= next((back for back in range(4) if view[end - back] & 0xC0 != 0x80), 0)
                self._say(bytes(view[start:end]))
                start = end
            return len(view)

    def _say(self, raw: bytes) -> None:
        try:
            wit_world.write_out(self._stream, False, raw.decode("utf-8"))
        except UnicodeDecodeError:
            wit_world.write_out(self._stream, True, raw.decode("latin-1"))


class _Output(CellOutput):
    """Written through at first, then every few writes: reading the clock would cost as much as writing."""

    def write(self, text: str) -> int:
        count = io.TextIOWrapper.write(self, text)
        self._writes += 1
        if self._writes <= _WRITTEN_THROUGH or self._writes % _WRITES_AT_ONCE == 0:
            self.flush()
        return count


class _Input(io.TextIOBase):
    """Standard input: at its end from the start."""

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> str:
        return ""

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        return ""


class _Transport:
    """Carries frames by calls into and out of the component."""

    def __init__(self, outputs: tuple[CellOutput, ...]) -> None:
        self._outputs = outputs
        self.max_chars = MAX_FRAME_CHARS
        self.ended = ""

    def send(self, message: Message, attachments: list[Attachment]) -> None:
        """The frame that ends the turn: the result of the call that began it."""
        self.ended = dump_string(dump_message(message), attachments, max_chars=self.max_chars)

    def exchange(self, message: Message, attachments: list[Attachment]) -> tuple[Any, list[Attachment]]:
        """A suspension."""
        frame = dump_string(dump_message(message), attachments, max_chars=self.max_chars)
        for output in self._outputs:
            try:
                output.flush()
            except ValueError:
                pass  # the cell closed it
        return load_string(wit_world.suspend(frame), max_chars=_NO_CAP)


def _stream_text(message: BindText) -> str:
    pieces: list[str] = []
    start = 0
    while start < message.chars:
        piece = unpack_text(wit_world.text_piece(start))
        if not piece:
            raise ValueError("the text ended early")
        pieces.append(piece)
        start += len(piece)
    return "".join(pieces)


class _Guest:
    def __init__(self) -> None:
        self._outputs = (_Output(_HostStream(1)), _Output(_HostStream(2)))
        sys.stdin = _Input()
        sys.stdout, sys.stderr = self._outputs
        sys.__stdin__ = sys.stdin  # type: ignore[misc, assignment]
        sys.__stdout__, sys.__stderr__ = self._outputs  # type: ignore[misc]
        sys.argv = [""]
        self._transport = _Transport(self._outputs)
        calls = LoopCalls()
        install(calls)
        self._session = GuestSession(self._transport, self._set_interruptible, _stream_text, calls)

    def _set_interruptible(self, value: bool) -> None:
        """Nothing interrupts here; a cell begins."""
        if value:
            for stream in self._outputs:
                stream.begin_cell()

    def request(self, frame: str) -> str:
        header, attachments = load_string(frame, max_chars=_NO_CAP)
        if header[0] == "configure":
            random.seed(wit_world.seed())  # the generator's state was made when the component was
            limit = header[2]
            self._transport.max_chars = MAX_FRAME_CHARS if limit is None else min(MAX_FRAME_CHARS, 4 * limit // 3 + FRAME_OVERHEAD)
        self._session.handle(header, attachments)
        return self._transport.ended


def _import_if_there(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:  # it needs what this interpreter lacks (processes, another system)
        sys.modules.pop(name, None)


def _prepare() -> None:
    for name in MODULES:
        importlib.import_module(name)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        for found in pkgutil.walk_packages(path, f"{package}.", onerror=lambda name: None):
            if not found.name.endswith("__main__"):
                _import_if_there(found.name)
    for name in PRIVATE:
        _import_if_there(name)
    sys.path.clear()  # nothing is there; a search would only cost time
    sys.path_importer_cache.clear()
    wasm_shims.install()


_prepare()
_guest: Final = _Guest()


class WitWorld(wit_world.WitWorld):  # type: ignore[misc]
    """The component's exports."""

    def request(self, frame: str) -> str:
        """Serve one request."""
        return _guest.request(frame)


# What is there now is for good: a collection that looked at it would make a copy of its pages in every session.
gc.collect()
gc.freeze()
