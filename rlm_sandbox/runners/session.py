"""The guest's session: a real Python REPL fed requests, with no idea of how frames travel.

One request comes in by `GuestSession.handle`; the turn-ending `Done` goes out by its transport. Host calls made by the
cell go through `HostCalls` on the same transport.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import inspect
import linecache
import re
import sys
import traceback
import types
from collections.abc import Callable, Coroutine
from typing import Any, Final

from ..context.view import ContextView
from ..wire.codec import Attachment, Decoder, Encoder, HandleRef, OpaqueValue, ValueRefused, ValueTooLarge
from ..wire.frames import FrameTooLarge
from ..wire.messages import (
    TOO_LARGE,
    BindData,
    BindObject,
    BindText,
    Configure,
    Done,
    Exec,
    Get,
    Message,
    Names,
    ReadFile,
    SetValue,
    load_message,
)
from .files import read_part
from .host_calls import HostCallError, HostCalls, Transport
from .mapped_data import data_value
from .proxies import AsyncCalls, make_async_function, make_function, make_object

__all__ = ("GuestSession", "summary")

#: The echo of a cell's last expression, in characters.
MAX_ECHO: Final = 20_000
_MAX_MESSAGE: Final = 4_000
_MAX_TRACEBACK: Final = 15_000
_MAX_NAMES: Final = 5_000
_MAX_NAME: Final = 200
_MAX_SUMMARY: Final = 80
_CELL: Final = "<cell "
#: One line that begins like an assignment or an import, and has no second statement: it is one, or an error, and has nothing
#: to echo. Compiled at once, which costs half as much as by way of a tree. Whatever else there is goes that way.
_ECHOES_NOTHING: Final = re.compile(
    r"(?:[A-Za-z_][A-Za-z_0-9.]*[ \t]*(?:[-+%&|^@]|\*\*?|//?|<<|>>)?=(?!=)|import[ \t]|from[ \t])[^;\r\n]*\n*\Z"
)
#: The directory or archive our own files were loaded from.
_OWN_FILES: Final = __file__.rpartition("/runners/")[0]
#: Bytes kept back for the moment after a MemoryError.
_RESERVE: Final = 1 << 20
_MISSING: Final = object()
_REQUESTS: Final = (Configure, Exec, Get, SetValue, BindObject, BindText, BindData, Names, ReadFile)


#: Value, values read, failure and whether the name was unknown: the first fields of `Done`.
_Outcome = tuple[Any, Any, "list[str] | None", bool]


def _cannot_map(_message: BindData) -> bytes:
    raise TypeError("this guest cannot map data")


def _opaque(value: Any) -> OpaqueValue:
    return OpaqueValue(type(value).__name__, repr(value)[:2_000])


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... [{len(text) - limit} more characters]"


class GuestSession:
    """Names, cells and host calls of one worker. Survives a fork: the copy goes on with the same names."""

    def __init__(
        self,
        transport: Transport,
        interruptible: Callable[[bool], None],
        map_text: Callable[[BindText], str],
        async_calls: AsyncCalls | None = None,
        map_data: Callable[[BindData], bytes] | None = None,
    ) -> None:
        """
        Args:
            transport: carries frames.
            interruptible: called with True when cell code begins and False when it ends; an interrupt may raise between.
            map_text: gives the text of a context whose descriptor came beside the message.
            map_data: gives the bytes of data whose descriptor came beside the message, where that can be.
            async_calls: how awaited host calls wait; in threads if it is not given.
        """
        self._transport = transport
        self._interruptible = interruptible
        self._map_text = map_text
        self._map_data = map_data or _cannot_map
        self._calls = HostCalls(transport, load_message, self._from_host)
        self._async_calls = async_calls or AsyncCalls()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._module = types.ModuleType("__main__")
        self._names: dict[str, Any] = self._module.__dict__
        self._names["__builtins__"] = builtins
        self._given: dict[str, Any] = dict(self._names)
        self._sent_names: list[str] = []
        self._reserve = bytes(_RESERVE)
        sys.modules["__main__"] = self._module
        vars(builtins).update(session_names=self.summaries, HostCallError=HostCallError, exit=sys.exit, quit=sys.exit)

    def after_fork(self) -> None:
        """In a new process: threads and the event loop are gone."""
        self._calls.after_fork()
        self._async_calls.after_fork()
        self._loop = None

    # ---- requests

    def handle(self, header: Any, attachments: list[Attachment]) -> None:
        """Serve one request to its `Done`."""
        message = load_message(header, _REQUESTS)
        self._calls.begin_cell()
        self._restore_reserve()
        outcome, attachments = self._guarded(message, attachments)
        self._calls.end_cell()
        self._async_calls.end_cell()
        names = self._changed_names()
        try:
            self._transport.send(Done(*outcome, names), attachments)
        except FrameTooLarge as exc:
            self._transport.send(Done(None, None, [TOO_LARGE, str(exc), ""], False, names), [])

    def _guarded(self, message: Message, attachments: list[Attachment]) -> tuple[_Outcome, list[Attachment]]:
        """Serve with interrupts on, and encode what came of it; whatever guest code raises is the request's failure."""
        try:
            self._interruptible(True)
            value, read, failure, unknown = self._serve(message, attachments)
            _flush()
            encoded: list[Attachment] = []
            if value is not None or read is not None:
                encoder = Encoder(_opaque, max_bytes=self._calls.value_bytes)
                value, read, encoded = encoder.encode(value), encoder.encode(read), encoder.attachments
            outcome: _Outcome = (value, read, failure, unknown)
            self._interruptible(False)
        except ValueTooLarge as exc:
            self._interruptible(False)
            return (None, None, [TOO_LARGE, str(exc), ""], False), []
        except ValueRefused as exc:
            self._interruptible(False)
            return (None, None, ["ValueError", f"the value cannot be sent: {exc}", ""], False), []
        except BaseException as exc:  # noqa: BLE001 - every exception of guest code is a result
            self._interruptible(False)
            return (None, None, self._failure(exc), False), []
        return outcome, encoded

    def _failure(self, exc: BaseException) -> list[str]:
        if isinstance(exc, MemoryError):
            self._reserve = b""  # given up so that what happened can still be said
        return [text.encode("utf-8", "backslashreplace").decode() for text in _describe(exc)]

    def _restore_reserve(self) -> None:
        if not self._reserve:
            try:
                bytes(4 * _RESERVE)  # what a cell needs comes first: one that frees what the last one left, say
                self._reserve = bytes(_RESERVE)
            except MemoryError:
                pass  # still at the limit

    def _serve(self, message: Message, attachments: list[Attachment]) -> tuple[Any, Any, list[str] | None, bool]:
        if isinstance(message, Exec):
            return self._exec(message)
        if isinstance(message, Get):
            value = self._names.get(message.name, _MISSING)
            return (None, None, None, True) if value is _MISSING else (value, None, None, False)
        decoder = Decoder(attachments, allow_handles=True)
        if isinstance(message, SetValue):
            self._names[message.name] = decoder.decode(message.tree)
        elif isinstance(message, BindObject):
            self._bind(message)
        elif isinstance(message, BindText):
            self._bind_text(message, decoder)
        elif isinstance(message, BindData):
            manifest = decoder.decode(message.manifest)
            value = data_value(message.kind, self._map_data(message), manifest)
            self._names[message.name] = self._given[message.name] = value
        elif isinstance(message, Names):
            return self.summaries(), None, None, False
        elif isinstance(message, ReadFile):
            return read_part(message.path, message.offset, message.size), None, None, False
        elif isinstance(message, Configure):
            self._configure(message)
        return None, None, None, False

    def _configure(self, message: Configure) -> None:
        self._calls.value_bytes = message.value_bytes
        if message.setup:
            linecache.cache["<setup>"] = (len(message.setup), None, message.setup.splitlines(True), "<setup>")
            exec(compile(message.setup, "<setup>", "exec", dont_inherit=True), self._names)  # noqa: S102 - the user's own source
        self._given.update(self._names)

    def _bind(self, message: BindObject) -> None:
        self._names[message.name] = self._given[message.name] = self._proxy(
            message.name,
            message.kind,
            HandleRef(
                message.handle, message.type_name, tuple(message.methods), tuple(message.attributes), tuple(message.operators)
            ),
        )

    def _proxy(self, name: str, kind: str, reference: HandleRef) -> Any:
        if kind == "function":
            return make_function(self._calls, reference.handle, name)
        if kind == "async":
            return make_async_function(self._calls, self._async_calls, reference.handle, name)
        return make_object(self._calls, reference)

    def _bind_text(self, message: BindText, decoder: Decoder) -> None:
        text = self._map_text(message)
        value: Any = text
        if not message.whole:
            spans = decoder.decode(message.spans)
            metadata = decoder.decode(message.meta)
            value = ContextView(text, memoryview(spans).cast("Q") if spans else (), metadata)
        self._names[message.name] = self._given[message.name] = value

    def _from_host(self, value: Any) -> Any:
        """A host call's answer with its handles turned into proxies."""
        if type(value) is HandleRef:
            return make_object(self._calls, value)
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self._from_host(item) for item in value)
        if type(value) is dict:
            return {key: self._from_host(item) for key, item in value.items()}
        return value

    # ---- cells

    def _exec(self, message: Exec) -> tuple[Any, Any, list[str] | None, bool]:
        value, failure = None, None
        try:
            result = self.run_cell(message.code, f"{_CELL}{message.number}>")
            if result is not None:
                value = _cut(repr(result), MAX_ECHO)
        except BaseException as exc:  # noqa: BLE001 - every exception of guest code is a result
            failure = self._failure(exc)
        read = {name: self._names[name] for name in message.read if name in self._names}
        return value, read or None, failure, False

    def rehearse(self, message: Exec) -> None:
        """Run a cell and encode its result, for nobody and on nobody's names."""
        names, self._names = self._names, {"__builtins__": builtins}
        try:
            value = self.run_cell(message.code, "<rehearsal>")
        finally:
            self._names = names
        Done(Encoder(_opaque).encode(repr(value)), None, None, False, self._variables()[:0])

    def run_cell(self, source: str, name: str) -> Any:
        """Compile and run a cell. A setup that brings a policy of its own replaces this on the session."""
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        if _ECHOES_NOTHING.match(source):
            return self._evaluate(compile(source, name, "exec", flags, dont_inherit=True))
        tree: Any = compile(source, name, "exec", flags | ast.PyCF_ONLY_AST, dont_inherit=True)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        if tree.body:
            self._evaluate(compile(tree, name, "exec", flags, dont_inherit=True))
        return self._evaluate(compile(last, name, "eval", flags, dont_inherit=True)) if last is not None else None

    def _evaluate(self, code: types.CodeType) -> Any:
        result = eval(code, self._names)  # noqa: S307 - running cells is what a guest is for
        if code.co_flags & inspect.CO_COROUTINE:
            return self._await(result)
        return result

    def _await(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            task.cancel()
            raise

    # ---- names

    def summaries(self) -> dict[str, str]:
        """The session's variables: name to a short summary. No guest code runs for it."""
        return {name: summary(self._names[name]) for name in self._variables() if name in self._names}

    def _variables(self) -> list[str]:
        given = self._given
        names = [
            name
            for name, value in list(self._names.items())
            if type(name) is str and name[:1] != "_" and given.get(name, _MISSING) is not value
        ]
        if len(names) <= _MAX_NAMES and all(map(str.isascii, names)) and max(map(len, names), default=0) <= _MAX_NAME:
            return names
        return [name[:_MAX_NAME].encode("utf-8", "replace").decode() for name in names[:_MAX_NAMES]]

    def _changed_names(self) -> list[str] | None:
        names = self._variables()
        if names == self._sent_names:
            return None
        self._sent_names = names
        return names


def _flush() -> None:
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (AttributeError, ValueError, OSError):
            pass  # the guest removed, replaced or closed its own stream


def summary(value: Any) -> str:
    """A variable in a few words. Runs no guest code."""
    kind = type(value)
    if value is None or kind in (bool, float) or (kind is int and value.bit_length() < 200):
        return f"{kind.__name__} {value!r}"
    if kind is str:
        return f"str, {len(value)} characters: {_cut(value[: _MAX_SUMMARY + 1], _MAX_SUMMARY)!r}"
    if kind in (bytes, bytearray, list, tuple, dict, set, frozenset):
        return f"{kind.__name__}, {len(value)} items"
    if kind is types.ModuleType:
        return f"module {str(getattr(value, '__name__', ''))[:_MAX_SUMMARY]}"
    return str(kind.__name__)[:_MAX_SUMMARY]


def _hide_own_frames(report: traceback.TracebackException) -> None:
    """Drop our frames from a report and the exceptions it came from: a traceback shows the guest's code only."""
    seen: set[int] = set()
    waiting: list[traceback.TracebackException | None] = [report]
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        part.stack[:] = [frame for frame in part.stack if not frame.filename.startswith(_OWN_FILES)]
        waiting += [part.__cause__, part.__context__, *(part.exceptions or ())]


def _describe(exc: BaseException) -> list[str]:
    """Type name, message and traceback of a guest exception; only guest frames."""
    try:
        report = traceback.TracebackException(type(exc), exc, exc.__traceback__, compact=True)
        _hide_own_frames(report)
        text = "".join(report.format())
        message = str(exc)
    except BaseException as failed:  # noqa: BLE001 - a guest's __str__ may raise anything
        text, message = "", f"<the exception could not be shown: {type(failed).__name__}>"
    if isinstance(exc, MemoryError) and not message:
        message = "out of memory"
    return [str(type(exc).__name__)[:200], _cut(message, _MAX_MESSAGE), _cut(text, _MAX_TRACEBACK)]
