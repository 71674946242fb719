"""`HandleTable`: the only door from a guest to host code.

A guest names a host function or object by an opaque id and, for an object, one name of its allow-list. Guest strings
are looked up in that list and never reach ``getattr`` unless they are in it. Arguments are plain data by the time they
come here. What a host function raises stays on the host unless its class was allowed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from ..binding import Exposed
from ..context import CONTEXT_METHODS, CONTEXT_OPERATORS, Context, DataContext
from ..wire.codec import MAX_ELEMENTS, MAX_JSON_INT, Decoder, Encoder, HandleRef, OpaqueValue, ValueRefused, WireError

__all__ = ("Binding", "CallFailed", "CallRefused", "CallReturned", "HandleTable", "HostCall", "Outcome", "plain_copy", "run_call")

log: Final = logging.getLogger("rlm_sandbox.host_calls")

#: Live handles of one session, bound and returned together; beyond it results that need one are refused.
MAX_HANDLES: Final = 10_000
#: Type names a guest sees for what went wrong in a host call.
HOST_CALL_ERROR: Final = "HostCallError"
MAX_MESSAGE_CHARS: Final = 2_000

#: Characters of pattern times characters of text in a case-insensitive search on the host: about three seconds at worst.
_MAX_SEARCH_WORK: Final = 300_000_000

_OPERATORS: Final[dict[str, tuple[int, Callable[..., Any]]]] = {
    "bool": (0, bool),
    "contains": (1, operator.contains),
    "eq": (1, operator.eq),
    "getitem": (1, operator.getitem),
    "iter": (0, lambda target: list(itertools.islice(target, MAX_ELEMENTS + 1))),  # one too many is refused by the codec
    "len": (0, len),
    "str": (0, str),
}


class CallRefused(Exception):
    """A guest asked for something that is not allowed. The text is fit for the guest: it names no host object."""


@dataclass(frozen=True, slots=True)
class Binding:
    """How to make one binding again in a fresh guest."""

    target: Any
    inline: bool
    errors: tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class HostCall:
    """One checked call, ready to run. ``name`` is what the user bound, for messages and traces."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inline: bool
    is_async: bool
    errors: tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class CallReturned:
    """A host call's value: plain data, an `Exposed` or a `Context`."""

    value: Any


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A host call's failure as the guest may see it."""

    type_name: str
    message: str


Outcome = CallReturned | CallFailed


@dataclass(frozen=True, slots=True)
class _Bound:
    name: str
    target: Any
    kind: str
    methods: frozenset[str]
    attributes: frozenset[str]
    operators: frozenset[str]
    inline: bool
    errors: tuple[type[BaseException], ...]
    type_name: str


def _is_async(function: Any) -> bool:
    """True for an ``async def``, and for an object whose class calls one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        inspect.getattr_static(type(function), "__call__", None)
    )


ExposeContext = Callable[[Context], tuple[Exposed, tuple[type[BaseException], ...]]]


def expose_context(context: Context) -> tuple[Exposed, tuple[type[BaseException], ...]]:
    """The context itself with its own allow-list."""
    return Exposed(context, frozenset(CONTEXT_METHODS), frozenset(), frozenset(CONTEXT_OPERATORS), "Context"), ()


class HandleTable:
    """The host objects one session's guest can reach, by opaque id. Not thread-safe: one session, one caller."""

    def __init__(self, expose_context: ExposeContext = expose_context) -> None:
        """
        Args:
            expose_context: what of a `Context` a guest may reach, and the errors whose message it may see.
        """
        self._expose_context = expose_context
        self._bound: dict[int, _Bound] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._bound)

    def add(
        self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()
    ) -> tuple[str, HandleRef]:
        """Register what ``bind`` was given; returns its kind (``function``, ``async``, ``object``) and its reference.

        Raises:
            TypeError: it is neither a function, an `Exposed` nor a `Context`, or ``errors`` are not exception classes.
            ValueError: the session has too many handles.
        """
        if not isinstance(errors, tuple) or not all(isinstance(item, type) and issubclass(item, BaseException) for item in errors):
            raise TypeError("bind(errors=...) takes a tuple of exception classes")
        if isinstance(target, Context):
            target, own_errors = self._expose_context(target)
            errors += own_errors
        if isinstance(target, Exposed):
            if any(member.startswith("_") for member in target.methods | target.attributes):
                raise TypeError("only public names can be exposed; make the object with expose()")
            bound = _Bound(
                name, target.target, "object", target.methods, target.attributes, target.operators, inline, errors, target.type_name
            )
        elif callable(target) and not isinstance(target, type):
            kind = "async" if _is_async(target) else "function"
            if inline and kind == "async":
                raise TypeError("bind(inline=True) takes a plain function; an async def runs on the session's event loop")
            bound = _Bound(name, target, kind, frozenset(), frozenset(), frozenset(), inline, errors, "function")
        elif isinstance(target, DataContext):
            raise TypeError("this backend cannot map data; bind a DataContext in a session of 'jail', or send bytes with set()")
        else:
            raise TypeError(
                f"cannot bind a {type(target).__name__}: bind takes a function, expose(obj, methods=...), or a Context; "
                f"plain data goes through set()"
            )
        if len(self._bound) >= MAX_HANDLES:
            raise ValueError(f"the session already holds {MAX_HANDLES} handles; reset it or bind fewer objects")
        handle = self._next
        self._next += 1
        self._bound[handle] = bound
        return bound.kind, HandleRef(
            handle, bound.type_name, tuple(sorted(bound.methods)), tuple(sorted(bound.attributes)), tuple(sorted(bound.operators))
        )

    def remove(self, handle: int) -> None:
        """Forget a handle; calls on it are refused from now on."""
        self._bound.pop(handle, None)

    def mark(self) -> int:
        """A point to `drop_since`: handles given out later belong to what came later."""
        return self._next

    def drop_since(self, mark: int) -> None:
        """Forget the handles given out since ``mark`` (the guest that held them is gone)."""
        for handle in [handle for handle in self._bound if handle >= mark]:
            del self._bound[handle]

    def copy(self, targets: Mapping[int, Any]) -> HandleTable:
        """A table with the same handles, for a copy of the session. ``targets``: other host objects for some of them."""
        table = HandleTable()
        table._next = self._next
        table._bound = {
            handle: replace(bound, target=targets[handle]) if handle in targets else bound for handle, bound in self._bound.items()
        }
        return table

    def resolve(self, handle: int, method: str | None, args: Any, kwargs: Any) -> HostCall:
        """Check one request against the table.

        Args:
            handle: the id the guest gave.
            method: None to call the handle itself, a method's name, ``.name`` to read an attribute, ``#name`` for
                an operator.
            args: a list or tuple of plain values.
            kwargs: a dict of plain values.

        Raises:
            CallRefused: the guest may not.
        """
        bound = self._bound.get(handle) if type(handle) is int else None
        if bound is None:
            raise CallRefused("there is no such host object")
        malformed = type(args) not in (list, tuple) or type(kwargs) is not dict
        if malformed or (method is not None and type(method) is not str):
            raise CallRefused(f"{bound.name}: arguments are malformed")
        if kwargs and not all(type(key) is str and key.isidentifier() for key in kwargs):
            raise CallRefused(f"{bound.name}: keyword arguments must be named by identifiers")
        name, function, is_async = bound.name, bound.target, bound.kind == "async"
        if method is None:
            if bound.kind == "object":
                raise CallRefused(f"{bound.name} is not callable")
        elif bound.kind != "object":
            raise CallRefused(f"{bound.name} has no such attribute")
        elif method.startswith("."):
            attribute = method[1:]
            if attribute not in bound.attributes or args or kwargs:
                raise CallRefused(f"{bound.name} has no such attribute")
            name, function, args = f"{bound.name}.{attribute}", getattr, (bound.target, attribute)
        elif method.startswith("#"):
            count, function = _OPERATORS.get(method[1:], (-1, bool))
            if method[1:] not in bound.operators or len(args) != count or kwargs:
                raise CallRefused(f"{bound.name} does not support this operation")
            name, args = f"{bound.name} ({method[1:]})", (bound.target, *args)
        else:
            if method not in bound.methods:
                raise CallRefused(f"{bound.name} has no such method")
            try:
                function = getattr(bound.target, method, None)
            except Exception as exc:
                log.info("%s.%s cannot be read", bound.name, method, exc_info=exc)
                function = None
            if not callable(function):  # it was there when the object was exposed
                raise CallRefused(f"{bound.name} has no such method")
            name, is_async = f"{bound.name}.{method}", _is_async(function)
        _check_search(name, function, args, kwargs)
        return HostCall(name, function, tuple(args), kwargs, bound.inline, is_async, bound.errors)

    def export(self, value: Any) -> HandleRef:
        """The codec's fallback for host results: an `Exposed` or `Context` becomes a handle, the rest is refused.

        Raises:
            ValueRefused: the value may not cross.
        """
        if isinstance(value, Exposed | Context):
            try:
                return self.add("result", value)[1]
            except ValueError as exc:
                raise ValueRefused(str(exc)) from None
        raise ValueRefused(f"a value of type {type(value).__name__} is not plain data")


def _check_search(name: str, function: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """A guest's regular expression never runs on the host: it would hold the interpreter's lock, and no limit could end it.

    For the methods of a `Context`, however they were bound: of the object, by themselves, or with some arguments given.
    """
    while isinstance(function, functools.partial):
        function, args, kwargs = function.func, (*function.args, *args), {**function.keywords, **kwargs}
    if not isinstance(function, types.MethodType) or not isinstance(function.__self__, Context):
        return
    context, method = function.__self__, function.__name__
    if (method == "find" and kwargs.get("regex")) or (method == "page" and (len(args) > 1 or "marker_pattern" in kwargs)):
        raise CallRefused(f"{name}: regular expressions do not run on the host; take the text with slice() and use re on it")
    if method == "find" and not kwargs.get("case_sensitive", True):
        pattern = args[0] if args else kwargs.get("pattern")
        if type(pattern) is str and len(pattern) * len(context) > _MAX_SEARCH_WORK:
            raise CallRefused(
                f"{name}: the pattern is too long for a search without case; take the text with slice() and lower() both"
            )


def failure(call: HostCall, exc: BaseException) -> CallFailed:
    """What the guest may see of an exception a host function raised; the host's log has the whole of it."""
    log.info("host call %s raised", call.name, exc_info=exc)
    if isinstance(exc, call.errors):
        try:
            text = str(exc)
        except Exception:  # noqa: BLE001 - a broken __str__ of the host's own class must not take the session down
            text = ""
        # It may quote the guest's own lone surrogates, which a header cannot carry.
        return CallFailed(type(exc).__name__, text[:MAX_MESSAGE_CHARS].encode("utf-8", "backslashreplace").decode())
    return CallFailed(HOST_CALL_ERROR, f"{call.name} failed")


def run_call(call: HostCall) -> Outcome:
    """Run a synchronous call on this thread. An interrupt of the host itself is raised, nothing else."""
    try:
        return CallReturned(call.function(*call.args, **call.kwargs))
    except (KeyboardInterrupt, SystemExit, GeneratorExit) as exc:
        if isinstance(exc, KeyboardInterrupt) and call.inline:
            raise
        return failure(call, exc)
    except BaseException as exc:  # noqa: BLE001 - whatever a host function raises is its outcome
        return failure(call, exc)


#: Leaves that the codec takes as they are, at no cost in bytes.
_FREE: Final = frozenset({type(None), bool, float})


def _is_small(value: Any, max_bytes: int | None) -> bool:
    """True for what is its own plain copy by the look of it: a leaf, or a short tuple of leaves, within ``max_bytes``.

    Most arguments and results of host calls are; the codec takes twenty times as long to say so.
    """
    items = value if type(value) is tuple and len(value) <= 8 else (value,)
    room = 0
    for item in items:
        kind = type(item)
        if kind is str:
            room += 4 * len(item)
        elif kind is int:
            if not -MAX_JSON_INT <= item <= MAX_JSON_INT:
                return False
        elif kind not in _FREE:
            return False
        room += 2
    return max_bytes is None or room <= max_bytes


def plain_copy(value: Any, *, max_bytes: int | None, fallback: Callable[[Any], Any] | None = None) -> Any:
    """``value`` as exact plain data, by way of the codec, for backends that pass objects and not frames.

    Raises:
        ValueRefused: it is not plain data, or too large, deep or many.
    """
    if _is_small(value, max_bytes):
        return value
    encoder = Encoder(max_bytes=max_bytes) if fallback is None else Encoder(fallback, max_bytes=max_bytes)
    try:
        tree = encoder.encode(value)
    except ValueRefused:
        raise
    except Exception as exc:  # foreign classes, and dicts that other threads change, raise what they like
        raise ValueRefused(f"it could not be read ({type(exc).__name__})") from exc
    try:
        return Decoder(encoder.attachments, allow_handles=True).decode(tree)
    except WireError as exc:
        raise ValueRefused(str(exc)) from None


def opaque(value: Any) -> OpaqueValue:
    """The codec's fallback for guest values on backends whose values are host objects: type name and capped repr."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the repr is foreign code: it may raise anything, and that is not the reader's error
        text = "<repr failed>"
    return OpaqueValue(type(value).__name__, text)
