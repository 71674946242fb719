"""The builtins of a restricted cell."""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NoReturn

from .classes import ClassMaker, GuestClass
from .guards import Guards, TypeOf
from .transformer import ELSEWHERE, check_width

__all__ = ("exit_cell", "make_builtins")

_AS_THEY_ARE: Final = (
    "__build_class__", "Ellipsis", "NotImplemented", "abs", "ascii", "bin", "bool", "bytes", "callable", "chr", "classmethod", "complex", "dict",
    "divmod", "enumerate", "filter", "float", "frozenset", "hex", "id", "int", "isinstance", "issubclass", "iter", "len", "list",
    "map", "next", "object", "oct", "ord", "property", "range", "repr", "reversed", "round", "set", "slice", "staticmethod", "str",
    "super", "tuple", "zip",
)  # fmt: skip
_NOT_THERE: Final = (
    "aiter", "anext", "bytearray", "compile", "eval", "exec", "globals", "help", "locals", "memoryview", "open", "vars",
)  # fmt: skip
_MISSING: Final = object()


def _exceptions() -> dict[str, Any]:
    return {
        name: kind
        for name, kind in vars(builtins).items()
        if isinstance(kind, type) and issubclass(kind, BaseException) and not name.endswith("Group") and not name.startswith("_")
    }


def _not_there(name: str) -> Callable[..., Any]:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NameError(f"{name}() is not in the restricted language; {ELSEWHERE}")

    return missing


# Closures, not partial objects: those would hand out what they hold by name.


def _sum(guards: Guards) -> Callable[..., Any]:
    """In pieces, with a look at the clock between them."""

    def sum_bounded(items: Iterable[Any], start: Any = 0) -> Any:
        bounded = guards.bounded(items)
        if bounded is items and type(items) is not range:
            return sum(items, start)
        iterator = iter(items)
        while piece := tuple(itertools.islice(iterator, 4_096)):
            start = sum(piece, start)
            guards.stop()
        return start

    return sum_bounded


def _extreme(guards: Guards, function: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(*args: Any, **options: Any) -> Any:
        if len(args) == 1:
            return function(guards.bounded(args[0]), **options)
        return function(*args, **options)

    return extreme


def _dir(obj: Any = _MISSING) -> list[str]:
    if obj is _MISSING:
        raise NameError("dir() without an argument is not in the restricted language; use session_names()")
    return [name for name in dir(obj) if not name.startswith("_")]


def exit_cell(code: object = None) -> NoReturn:
    """``sys.exit``, ``exit`` and ``quit``: they end the cell."""
    raise SystemExit(code)


def _input(prompt: object = "") -> str:
    raise EOFError("there is nobody to ask")


def make_builtins(
    guards: Guards, print_: Callable[..., None], modules: Callable[..., Any], halt: Callable[[], None]
) -> dict[str, Any]:
    """The ``__builtins__`` of a session; its hooks are below names that begin with a dot."""
    table: dict[str, Any] = {name: getattr(builtins, name) for name in _AS_THEY_ARE}
    table.update(_exceptions())
    table.update((name, _not_there(name)) for name in _NOT_THERE)
    table.update(
        all=lambda items: all(guards.bounded(items)),
        any=lambda items: any(guards.bounded(items)),
        delattr=guards.delattr,
        dir=_dir,
        exit=exit_cell,
        quit=exit_cell,
        format=lambda value, spec="": format(value, check_width(spec)),
        getattr=guards.getattr,
        hasattr=guards.hasattr,
        hash=guards.hash,
        input=_input,
        max=_extreme(guards, max),
        min=_extreme(guards, min),
        pow=guards.power,
        print=print_,
        setattr=guards.setattr,
        sorted=lambda items, *, key=None, reverse=False: sorted(guards.bounded(items, stored=True), key=key, reverse=reverse),
        sum=_sum(guards),
        type=TypeOf(),
        __import__=modules,
    )
    hooks: Mapping[str, Any] = {
        ".stop": False, ".halt": halt, ".getattr": guards.getattr, ".write": guards.write, ".class": ClassMaker(),
        ".type": type, ".guests": GuestClass,
        ".repeat": guards.repeat, ".pow": guards.pow, ".lshift": guards.lshift, ".stored": guards.stored,
    }  # fmt: skip
    return {**table, **hooks}
