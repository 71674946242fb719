"""Names that cross: a Python identifier, short, and no dunder."""

from __future__ import annotations

import keyword
from typing import Final

__all__ = ("checked_name",)

_MAX: Final = 200


def checked_name(name: str) -> str:
    """``name`` if it can be a variable of a guest.

    Raises:
        TypeError, ValueError: it cannot.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name must be a str, not {type(name).__name__}")
    if not name.isidentifier() or keyword.iskeyword(name) or len(name) > _MAX:
        raise ValueError(f"{name[:60]!r} is not a name a variable can have")
    if name.startswith("__"):
        raise ValueError(f"{name!r} belongs to the interpreter; choose a name without two leading underscores")
    return name
