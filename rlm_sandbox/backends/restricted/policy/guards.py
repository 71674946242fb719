"""What is left to decide when a cell runs: attributes whose name is not enough, writes, sizes, and texts of formats."""

from __future__ import annotations

import string
import types
import typing
from _string import formatter_field_name_split, formatter_parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from .classes import GuestClass, is_guests
from .transformer import CLASS_NAMES, GUARDED_ATTRIBUTES, INSPECT_ATTRIBUTES, LOADABLE, check_width

__all__ = ("Guards", "TypeOf")

_NAMEDTUPLE: Final = frozenset({"_asdict", "_fields", "_make", "_replace"})
#: Nested tuples are hashed by a recursion in C that ends the process.
_MAX_HASH_DEPTH: Final = 500
_MAX_HASH_NODES: Final = 100_000
#: Formats remembered by a session.
_MAX_KNOWN: Final = 256
_MAX_KNOWN_CHARS: Final = 200
#: A range that a loop in C walks through in about a tenth of a second.
_SHORT: Final = 10_000_000


class TypeOf:
    """``type`` as a cell has it: the class of an object, or a new class under the rules of a class statement."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        if len(args) == 1:
            kind = type(args[0])
            if kind is super or issubclass(kind, _ALIASES):
                # The one would look beyond what the source of a cell may ask of super(); the other, of whatever it is an alias of, passes
                # attributes on and sets one of what that makes.
                raise TypeError("super() and generic aliases have no type here")
            return self if issubclass(kind, type) else kind  # a metaclass would make classes by its own rules
        name, bases, namespace = args
        if type(name) is not str or type(bases) is not tuple or type(namespace) is not dict:
            raise TypeError("type() takes a name, a tuple of classes and a dict")
        for key in namespace:
            if type(key) is not str or (key.startswith("__") and key not in CLASS_NAMES) or key in INSPECT_ATTRIBUTES:
                raise TypeError(f"a class may not have the attribute {key!r:.100}")
        return GuestClass(name, bases, {"__module__": "__main__", **namespace})

    def __instancecheck__(self, obj: Any) -> bool:
        return isinstance(obj, type)

    def __eq__(self, other: object) -> bool:
        return other is self or other is type

    def __hash__(self) -> int:
        return hash(type)

    def __repr__(self) -> str:
        return "<class 'type'>"


class _Formatter(string.Formatter):
    """``str.format`` whose fields go through the guards."""

    def __init__(self, read: Callable[[Any, str], Any]) -> None:
        self._read = read

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        first, rest = formatter_field_name_split(field_name)
        obj = self.get_value(first, args, kwargs)
        for is_attribute, key in rest:
            obj = self._read(obj, key) if is_attribute else obj[key]
        return obj, first

    def format_field(self, value: Any, format_spec: str) -> str:
        return format(value, check_width(format_spec))


class Guards:
    """The guards of one session. ``names`` are its variables; ``max_bytes`` bounds what one operation may make."""

    def __init__(self, names: dict[str, Any], max_bytes: int, stop: Callable[[], None]) -> None:
        """``stop`` raises if the cell is to end."""
        self._names = names
        self._max_bytes = max_bytes
        self.stop = stop
        self._formatter = _Formatter(self.getattr)
        self._plain: dict[str, bool] = {}

    # ---- attributes

    def getattr(self, obj: Any, name: str, *default: Any) -> Any:
        """``getattr`` for names that the source does not show, or whose objects matter."""
        if type(name) is not str:
            raise TypeError("an attribute's name must be a str")
        if name in INSPECT_ATTRIBUTES:
            raise AttributeError(f"the attribute {name!r} leads into the interpreter")
        if name.startswith("_"):
            self._check_private(obj, name)
            if name == "__name__":
                return str(type.__dict__["__name__"].__get__(obj)) if isinstance(obj, type) else obj.__name__
        elif name in GUARDED_ATTRIBUTES and not (name == "register" and is_guests(obj)):
            if name in ("format", "format_map"):
                return self._format(obj, name) if type(obj) is str else self._formatting(getattr(obj, name, *default))
            if name in ("mro", "register") or isinstance(obj, BaseException) or type(obj) in _PASS_ON:
                raise AttributeError(f"the attribute {name!r} leads out of the cell")
        return getattr(obj, name, *default)

    def _formatting(self, found: Any) -> Any:
        """What an object gave for ``format``. Not only a text has that of a text: ``super()`` and generic aliases pass it on."""
        if type(found) is types.BuiltinMethodType and isinstance(found.__self__, str):
            return self._format(found.__self__, found.__name__)
        return self._format(str, found.__name__) if found is str.format or found is str.format_map else found

    def _check_private(self, obj: Any, name: str) -> None:
        if name == "__name__":
            allowed = type(obj) is type or is_guests(obj) or isinstance(obj, types.FunctionType | types.BuiltinFunctionType)
        elif not name.startswith("__"):
            allowed = is_guests(obj) or (name in _NAMEDTUPLE and (isinstance(obj, tuple) or _is_tuple_class(obj)))
        elif name in ("__class__", "__dict__"):
            allowed = type(type(obj)) is GuestClass
        else:
            allowed = name in LOADABLE and (type(obj) is super or is_guests(obj) or _is_plain_class(obj))
        if not allowed:
            raise AttributeError(f"the attribute {name!r:.100} is not for cells; see the limitations of restricted")

    def _format(self, text: Any, name: str) -> Callable[..., str]:
        formatter = self._formatter
        if isinstance(text, type):  # the method of the class: the text comes first
            return lambda text, *args, **kwargs: self._format(str.__str__(text), name)(*args, **kwargs)
        if type(text) is str and name == "format" and self._is_plain(text):
            return text.format
        if name == "format":
            return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)
        return lambda mapping: formatter.vformat(text, (), mapping)

    def _is_plain(self, text: str) -> bool:
        """Whether a format reads no attribute, no item and no width of its arguments: then it is Python's own to do.

        Raises:
            ValueError: it is malformed, or too wide.
        """
        known = self._plain.get(text)
        if known is None:
            known = all(
                field is None or not ("." in field or "[" in field or "{" in check_width(spec))
                for _, field, spec, _ in formatter_parser(text)
            )
            if len(text) < _MAX_KNOWN_CHARS and len(self._plain) < _MAX_KNOWN:
                self._plain[text] = known
        return known

    def hasattr(self, obj: Any, name: str) -> bool:
        """See `getattr`."""
        try:
            self.getattr(obj, name)
        except AttributeError:
            return False
        return True

    def write(self, obj: Any) -> Any:
        """``obj`` if its attributes are the cell's to change: modules, classes and functions of the host are shared."""
        if is_guests(obj) or (type(obj) is types.FunctionType and obj.__globals__ is self._names):
            return obj
        raise AttributeError(f"attributes of {type(obj).__name__!r} objects cannot be changed by a cell")

    def _check_write(self, name: str) -> None:
        if type(name) is not str or name.startswith("__") or name in INSPECT_ATTRIBUTES:
            raise AttributeError("a cell cannot change this attribute")

    def setattr(self, obj: Any, name: str, value: Any) -> None:
        """See `write`."""
        self._check_write(name)
        setattr(self.write(obj), name, value)

    def delattr(self, obj: Any, name: str) -> None:
        """See `write`."""
        self._check_write(name)
        delattr(self.write(obj), name)

    # ---- sizes

    def check_size(self, size: int) -> None:
        """Raise MemoryError if ``size`` bytes are more than one operation may make."""
        if size > self._max_bytes:
            raise MemoryError(f"one operation would make more than {self._max_bytes:,} bytes")

    def repeat(self, left: Any, right: Any) -> Any:
        """``left * right`` where one of them is written as a text or a list."""
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(sequence, str | bytes | list | tuple):
                self.check_size(len(sequence) * count * (8 if isinstance(sequence, list | tuple) else 1))
        return left * right

    def pow(self, left: Any, right: Any) -> Any:
        """``left ** right``."""
        if isinstance(left, int) and isinstance(right, int) and right > 0:
            self._check_number(left.bit_length() * right if left not in (-1, 0, 1) else 0)
        return left**right

    def lshift(self, left: Any, right: Any) -> Any:
        """``left << right``."""
        if isinstance(left, int) and isinstance(right, int) and left:
            self._check_number(right + left.bit_length())
        return left << right

    def power(self, base: Any, exponent: Any, modulus: Any = None) -> Any:
        """The function ``pow``."""
        return self.pow(base, exponent) if modulus is None else pow(base, exponent, modulus)

    def _check_number(self, bits: int) -> None:
        if bits > 1 << 24:  # a million decimal digits take seconds to multiply and more to print
            raise OverflowError(f"a number of {bits:,} bits is too large for a restricted cell")

    def hash(self, obj: Any) -> int:
        """``hash``, for tuples that are not nested so deep that the interpreter would end."""
        waiting, seen = [(obj, 0)], 0
        while waiting and type(obj) is tuple:
            item, depth = waiting.pop()
            seen += 1
            if depth > _MAX_HASH_DEPTH or seen > _MAX_HASH_NODES:
                raise RecursionError("a tuple is nested too deep, or is too large, to be hashed in a restricted cell")
            waiting += [(part, depth + 1) for part in item if type(part) is tuple]
        return hash(obj)

    # ---- loops in C

    def bounded(self, items: Iterable[Any], *, stored: bool = False) -> Iterable[Any]:
        """``items`` for a loop in C: as they are if there is an end to them, else with a look at the clock at each.

        ``stored``: all of them will be kept.
        """
        kind = type(items)
        if kind in _FINITE or kind is types.GeneratorType:  # a generator of a cell looks at the clock itself
            return items
        if kind is range:
            if stored:
                self.check_size(8 * _length(items))  # type: ignore[arg-type]
            if _length(items) <= _SHORT:  # type: ignore[arg-type]
                return items
        return self._watched(items, stored=stored)

    def stored(self, items: Any) -> Any:
        """What a builtin container is made from, bounded."""
        if isinstance(items, int):
            self.check_size(items)
            return items
        return items if hasattr(items, "keys") or not hasattr(items, "__iter__") else self.bounded(items, stored=True)

    def _watched(self, items: Iterable[Any], *, stored: bool) -> Iterator[Any]:
        most = self._max_bytes // 8 if stored else 0
        for count, item in enumerate(items):
            self.stop()
            if stored and count > most:
                raise MemoryError(f"more than {most:,} items are too many for one restricted cell")
            yield item


#: Objects whose attributes are another's.
_TYPING_ALIAS: Final[Any] = type(typing.List[int])  # noqa: UP006 - of this one's kind, which `list[int]` is not
_ALIASES: Final = (types.GenericAlias, next(kind for kind in _TYPING_ALIAS.__mro__ if kind.__name__ == "_BaseGenericAlias"))
_PASS_ON: Final = frozenset({super, types.MethodType, types.GenericAlias})
_PLAIN_CLASSES: Final = frozenset({object, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset})
_FINITE: Final = frozenset({list, tuple, str, dict, set, frozenset, bytes, type({}.keys()), type({}.values()), type({}.items())})


def _length(items: range) -> int:
    return max(0, (items.stop - items.start + items.step - (1 if items.step > 0 else -1)) // items.step)


def _is_plain_class(obj: Any) -> bool:
    """``str.__hash__``, ``Exception.__init__``: what a cell's class inherits, by name."""
    return type(obj) is type and (obj in _PLAIN_CLASSES or (issubclass(obj, BaseException) and obj.__module__ == "builtins"))


def _is_tuple_class(obj: Any) -> bool:
    return isinstance(obj, type) and issubclass(obj, tuple)
