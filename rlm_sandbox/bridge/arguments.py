"""What every session checks of its caller's arguments, before it looks whether it is busy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..binding import Exposed
from ..context import Context, WholeText
from ..errors import UnsendableValue
from ..wire.codec import ValueRefused
from .names import checked_name

__all__ = ("as_source", "checked_read", "sendable")

_T = TypeVar("_T")


def checked_read(code: object, read: Iterable[str]) -> list[str]:
    """The names that ``exec(code, read=...)`` is to read.

    Raises:
        TypeError, ValueError: the code is no text, or these are no names.
    """
    if not isinstance(code, str):
        raise TypeError(f"exec() takes source code as a str, not {type(code).__name__}")
    if isinstance(read, str):
        raise TypeError(f"exec(read=...) takes a tuple of names, not one string; write ({read!r},)")
    return [checked_name(name) for name in read]


def as_source(text: str) -> str:
    """``text`` with its lone surrogates, which are no source code, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def sendable(name: str, value: Any, copied: Callable[[Any], _T]) -> _T:
    """What ``copied`` makes of a value for ``set(name, value)``.

    Raises:
        TypeError: the value has to be bound.
        UnsendableValue: it cannot cross exactly.
    """
    if isinstance(value, Context | Exposed | WholeText) or callable(value):
        raise TypeError(f"set() takes plain data; use bind({name!r}, ...) for functions and objects")
    try:
        return copied(value)
    except ValueRefused as exc:
        raise UnsendableValue(f"{name} cannot be set: {exc}; send plain data, or bind an object with expose()") from None
