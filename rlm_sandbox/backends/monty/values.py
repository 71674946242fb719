"""Values between host and interpreter: exact plain data, `Opaque`, or a refusal. The engine would change some silently."""

from __future__ import annotations

import datetime as dt
import re
import sys
from collections.abc import Callable
from typing import Any, Final

from ...bridge.handles import plain_copy
from ...results import Opaque
from ...wire.codec import HandleRef, OpaqueValue, ValueRefused

__all__ = ("arguments", "from_guest", "to_guest", "weight")

#: A guest's function arrives as text, its only trace. A text that looks exactly so is refused as an argument.
_CALLABLE_TEXT: Final = re.compile(
    r"<(?:function|bound method|class|coroutine|built-in) [^\n]{0,300}>|<host (?:function|method) [^\n]{0,300}>"
)
#: So do other objects that are no plain data. A text that looks exactly so arrives as `Opaque` too.
_OBJECT_TEXT: Final = re.compile(
    r"<(?P<object>[\w.]{1,60})(?: [\w.]{1,60})? object[^\n]{0,300}>|<(?P<plain>module|stdout|stderr|\w{1,60}_\w{0,20}iterator)[^\n]{0,300}>"
    r"|(?P<range>range|slice)\([^\n()]{1,100}\)"
    r"|(?P<call>re\.compile|functools\.partial|dict_keys|dict_values|dict_items|Context|Field)\((?:'|r'|<|\[|prec=|name=).*\)",
    re.DOTALL,
)
MAX_FRAME_BYTES: Final = 240 << 20


def to_guest(value: Any, max_bytes: int | None, fallback: Callable[[Any], Any] | None, proxy: Callable[[HandleRef], Any]) -> Any:
    """``value`` as the engine takes it, or a refusal where the engine would not hold it exactly.

    Args:
        fallback: what to do with objects, as of `plain_copy`.
        proxy: the engine's object for a handle.

    Raises:
        ValueRefused: the value cannot cross exactly.
    """
    limit = MAX_FRAME_BYTES if max_bytes is None else min(max_bytes, MAX_FRAME_BYTES)
    return _sendable(plain_copy(value, max_bytes=limit, fallback=fallback), proxy)


def _sendable(value: Any, proxy: Callable[[HandleRef], Any]) -> Any:
    kind = type(value)
    if kind is str:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueRefused("a text with lone surrogates cannot be held by this backend") from None
        return value
    if kind is list:
        return [_sendable(item, proxy) for item in value]
    if kind is dict:
        return {_sendable(key, proxy): _sendable(item, proxy) for key, item in value.items()}
    if kind is tuple:
        return tuple([_sendable(item, proxy) for item in value])
    if kind is set:
        return {_sendable(item, proxy) for item in value}
    if kind is frozenset:
        return frozenset([_sendable(item, proxy) for item in value])
    if kind is HandleRef:
        return proxy(value)
    if kind is dt.datetime or kind is dt.time:
        if value.fold:
            raise ValueRefused("a time with fold=1 cannot be held by this backend")
        if value.tzinfo is not None:
            _sendable(value.tzinfo, proxy)
    elif kind is dt.timezone and value.utcoffset(None) % dt.timedelta(seconds=1):
        raise ValueRefused("a time zone with a fraction of a second cannot be held by this backend")
    return value


def from_guest(value: Any, mark: str, max_bytes: int | None) -> Any:
    """The host's copy of a value that went through ``_rlm_plain``.

    Raises:
        ValueRefused: it is too large.
    """
    return _opened(plain_copy(value, max_bytes=max_bytes, fallback=_no_fallback), mark)


def _no_fallback(value: Any) -> Any:
    return OpaqueValue(type(value).__name__, "<not plain data>")


def _opened(value: Any, mark: str) -> Any:
    kind = type(value)
    if kind is tuple:
        if len(value) == 3 and value[0] == mark:
            return Opaque(str(value[1])[:200], str(value[2])[:2000])
        return tuple([_opened(item, mark) for item in value])
    if kind is list:
        return [_opened(item, mark) for item in value]
    if kind is dict:
        return {_opened(key, mark): _opened(item, mark) for key, item in value.items()}
    if kind is set:
        return {_opened(item, mark) for item in value}
    if kind is frozenset:
        return frozenset([_opened(item, mark) for item in value])
    if kind is OpaqueValue:
        return Opaque(value.type_name, value.repr)
    return value


def arguments(value: Any, max_bytes: int | None) -> Any:
    """A host call's arguments, as the engine gave them, as exact plain data.

    Raises:
        ValueRefused: they hold a callable, or are too large.
    """
    if not value:
        return type(value)()
    plain = plain_copy(value, max_bytes=max_bytes, fallback=_guest_object)
    if type(plain) is tuple:  # the arguments' own tuple is none of the guest's
        return tuple([_plain_argument(item) for item in plain])
    return {key: _plain_argument(item) for key, item in plain.items()}


def weight(value: Any) -> int:
    """Bytes of memory that plain data takes, about."""
    total, pending = 0, [value]
    while pending:
        item = pending.pop()
        total += sys.getsizeof(item)
        kind = type(item)
        if kind in (list, tuple, set, frozenset):
            pending += item
        elif kind is dict:
            pending += item.keys()
            pending += item.values()
    return total


def _guest_object(value: Any) -> OpaqueValue:
    # An instance of a guest's class, a type or a host object: the engine's own stand-in; its class name is the guest's.
    name = getattr(value, "name", None) if type(value).__module__ == "pydantic_monty" else type(value).__name__
    return OpaqueValue(name if isinstance(name, str) else type(value).__name__, "<object>")


#: What the engine puts in place of a container inside itself: a text, as if the guest had written it.
_ITSELF: Final[dict[type, str]] = {list: "[...]", dict: "{...}", tuple: "(...)"}
_FIRST: Final = frozenset("<rsfdCF")
_TYPE_OF: Final = {text: kind.__name__ for kind, text in _ITSELF.items()}


def _plain_argument(value: Any, around: frozenset[str] = frozenset()) -> Any:
    """``around``: the texts that may stand for a container around ``value``, inside which they are no text for certain."""
    kind = type(value)
    if kind is str:
        if value in around:
            return Opaque(_TYPE_OF[value], value)
        if value.startswith("<") and _CALLABLE_TEXT.fullmatch(value):
            raise ValueRefused("a guest's function cannot be passed to a host function; pass plain data")
        found = _OBJECT_TEXT.fullmatch(value) if value[:1] in _FIRST else None
        return value if found is None else Opaque(str(found[found.lastgroup or 0]), value[:2000])
    if kind in _ITSELF:
        around |= {_ITSELF[kind]}
    if kind is list:
        return [_plain_argument(item, around) for item in value]
    if kind is tuple:
        return tuple([_plain_argument(item, around) for item in value])
    if kind is dict:
        return {_plain_argument(key): _plain_argument(item, around) for key, item in value.items()}
    if kind in (set, frozenset):
        return kind([_plain_argument(item) for item in value])
    if kind is OpaqueValue:
        return Opaque(value.type_name, value.repr)
    return value
