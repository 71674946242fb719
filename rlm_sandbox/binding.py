"""`expose`: which methods, attributes and operators of a host object a guest may reach. Nothing else is reachable."""

from __future__ import annotations

import keyword
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

__all__ = ("OPERATORS", "Exposed", "expose")

#: Operators that can be allowed, by the name used in ``expose(operators=...)``.
OPERATORS: Final = ("bool", "contains", "eq", "getitem", "iter", "len", "str")


@dataclass(frozen=True, slots=True)
class Exposed:
    """A host object with its allow-list. Make one with `expose`."""

    target: Any
    methods: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()
    type_name: str = "object"


def _public_names(kind: str, names: Iterable[str]) -> frozenset[str]:
    if isinstance(names, str):
        raise TypeError(f"expose({kind}=...) takes a tuple of names, not one string; write ({names!r},)")
    checked = frozenset(names)
    for name in checked:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"expose({kind}=...): {name!r} is not an identifier")
        if name.startswith("_"):
            raise ValueError(f"expose({kind}=...): {name!r} is private; only public names can be exposed")
    return checked


def expose(
    obj: Any,
    *,
    methods: Iterable[str] = (),
    attributes: Iterable[str] = (),
    operators: Iterable[str] = (),
) -> Exposed:
    """Allow a guest to call ``methods``, read ``attributes`` and use ``operators`` of ``obj``, and nothing else.

    Arguments that arrive from the guest are plain data. Results must be plain data or another `Exposed`.

    Args:
        obj: the host object; it never leaves the host.
        methods: public method names.
        attributes: public attribute names (read only).
        operators: names from `OPERATORS`. ``iter`` sends a snapshot list, capped like every value.

    Raises:
        TypeError, ValueError: a name is private or not an identifier, a method is missing on ``obj``, or an operator is
            unknown. Attributes may come and go; reading one that is not there fails in the guest.
    """
    checked_methods = _public_names("methods", methods)
    checked_attributes = _public_names("attributes", attributes)
    checked_operators = frozenset(operators)
    for operator in checked_operators:
        if operator not in OPERATORS:
            raise ValueError(f"expose(operators=...): unknown operator {operator!r}; choose from {', '.join(OPERATORS)}")
    for name in checked_methods:
        if not callable(getattr(obj, name, None)):
            raise TypeError(f"expose(methods=...): {type(obj).__name__} has no method {name!r}")
    both = checked_methods & checked_attributes
    if both:
        raise ValueError(f"expose(): {sorted(both)} are given as methods and as attributes; choose one")
    return Exposed(
        target=obj,
        methods=checked_methods,
        attributes=checked_attributes,
        operators=checked_operators,
        type_name=type(obj).__name__,
    )
