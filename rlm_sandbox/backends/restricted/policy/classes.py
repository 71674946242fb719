"""The classes of cells: what tells them from the host's, and which kind a class statement makes."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Final

__all__ = ("ClassMaker", "GuestClass", "is_guests", "make_enum")

_BASES: Final = ("Enum", "Flag", "IntEnum", "IntFlag", "StrEnum")


#: What a cell may not inherit from. `dataclasses` makes source code of what a field says its name is.
_NO_BASES: Final = (dataclasses.Field,)


def _check_bases(bases: tuple[Any, ...]) -> None:
    for base in bases:
        if isinstance(base, type) and issubclass(base, _NO_BASES):
            raise TypeError(f"a class of the restricted language cannot inherit from {base.__name__}")


class _Inherited:
    """A method that every class of a cell has of what it inherits from, and no dict of an instance can stand before.

    `copy` asks an instance how to make it anew, and sets attributes of whatever the answer makes.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, obj: Any, owner: type) -> Any:
        for base in owner.__mro__:
            found = vars(base).get(self._name)
            if found is not None and type(found) is not _Inherited:
                return found.__get__(obj, owner)
        raise AttributeError(self._name)

    def __set__(self, obj: Any, value: Any) -> None:
        raise AttributeError(f"{self._name} cannot be changed by a cell")


_COPIED_BY: Final = {name: _Inherited(name) for name in ("__reduce__", "__reduce_ex__")}


class GuestClass(type):
    """The type of every ordinary class a cell defines."""

    def __new__(cls, name: str, bases: tuple[Any, ...], namespace: Any, **options: Any) -> GuestClass:
        """Make the class."""
        _check_bases(bases)
        return super().__new__(cls, name, bases, {**namespace, **_COPIED_BY}, **options)


class GuestEnum(enum.EnumType):
    """The type of a cell's enumerations, and of the bases it makes them from, which are its session's own."""

    def __new__(cls, name: str, bases: tuple[Any, ...], namespace: Any, **options: Any) -> GuestEnum:
        """Make the enumeration."""
        _check_bases(bases)
        return super().__new__(cls, name, bases, namespace, **options)

    def __call__(cls, value: Any, *names: Any, **options: Any) -> Any:
        """A member by its value, or a new enumeration of names, which follow the rules of a class body."""
        if not names and not options:
            return super().__call__(value)
        if len(names) != 1 or options or type(value) is not str or cls.__members__:
            raise TypeError("an enumeration takes a name and its members, or is written as a class, in the restricted language")
        members: Any = names[0].replace(",", " ").split() if type(names[0]) is str else names[0]
        namespace = cls.__prepare__(value, (cls,))  # type: ignore[no-untyped-call, unused-ignore]
        pairs: Any = members.items() if type(members) is dict else [(item, None) if type(item) is str else item for item in members]
        for name, given in pairs:
            if type(name) is not str or name.startswith("_"):
                raise TypeError(f"an enumeration may not have the member {str(name)[:100]!r}")
            namespace[name] = enum.auto() if given is None else given
        namespace["__module__"] = "__main__"
        return GuestEnum(value, (cls,), namespace)


_KINDS: Final = (GuestClass, GuestEnum)


def is_guests(obj: Any) -> bool:
    """Whether ``obj`` is a class of a cell, or an instance of one. By exact type: an object may claim any ``__class__``."""
    return type(obj) in _KINDS or type(type(obj)) in _KINDS


class ClassMaker:
    """What stands for the metaclass in every class statement of a cell."""

    __slots__ = ()

    def __prepare__(self, name: str, bases: tuple[Any, ...]) -> Any:
        return GuestEnum.__prepare__(name, bases) if _is_enum(bases) else {}  # type: ignore[no-untyped-call, unused-ignore]

    def __call__(self, name: str, bases: tuple[Any, ...], namespace: Any) -> Any:
        """Make the class."""
        return (GuestEnum if _is_enum(bases) else GuestClass)(name, bases, namespace)


def _is_enum(bases: tuple[Any, ...]) -> bool:
    return any(type(base) is GuestEnum for base in bases)


def make_enum() -> dict[str, Any]:
    """The module ``enum`` of one session. Its bases are made anew: a cell may change what it inherits from."""
    members: dict[str, Any] = {"auto": enum.auto, "unique": enum.unique}
    for name in _BASES:
        real = getattr(enum, name)
        namespace = GuestEnum.__prepare__(name, (real,))  # type: ignore[no-untyped-call, unused-ignore]
        namespace["__module__"], namespace["__qualname__"] = "enum", name
        members[name] = GuestEnum(name, (real,), namespace)
    return members
