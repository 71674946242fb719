"""Plain values to a JSON tree plus raw attachments, and back. Never pickle, marshal or eval.

A value becomes JSON scalars and tagged arrays; long texts and all bytes become *attachments*, which travel raw
after the JSON header, so that a 10 MB string crosses at memcpy speed and is never escaped. Encoding is exact or
it raises: subclasses go as their plain base, NaN, infinities, huge ints and lone surrogates arrive as they were,
and what is not plain data is an `Opaque` (guest to host) or an error (host to guest).

Both ends treat the other's tree as hostile: `decode` counts elements and depth and checks every tag and type.
"""

from __future__ import annotations

import collections
import datetime as dt
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, NoReturn

#: Nested containers. Well below the interpreter's own recursion limit on both sides.
MAX_DEPTH: Final = 64
#: Elements of all containers of one value together. 1e6 elements of at most about 100 bytes each bound what a
#: small frame can make the host allocate to about 100 MB.
MAX_ELEMENTS: Final = 1_000_000
#: Dict keys and set elements that are neither text: their hashes are not seeded, so a guest can make them collide.
#: 50,000 crafted keys cost the host about a second at worst.
MAX_UNSEEDED_KEYS: Final = 50_000
#: Keys of equal hash in one dict or set; ordinary data has one or two (-1 and -2).
MAX_EQUAL_HASHES: Final = 32
#: Longer texts travel as attachments.
INLINE_CHARS: Final = 512
#: More attachments than this in one frame are refused by the framing layer; long texts beyond it stay inline.
MAX_ATTACHMENTS: Final = 4_096
#: Largest integer sent as a JSON number: beyond 2**53 other JSON readers lose digits, and Python's own
#: int-from-text conversion is quadratic and capped at 4,300 digits. Larger ones travel as hex.
MAX_JSON_INT: Final = 1 << 53
#: Length of an opaque value's type name and repr.
MAX_OPAQUE_NAME: Final = 200
MAX_OPAQUE_REPR: Final = 2_000

Attachment = str | bytes


class WireError(Exception):
    """The bytes or values on the wire are not what the protocol allows. The text never quotes a guest's value."""


class ValueRefused(WireError):
    """A value cannot cross: wrong type, too deep, too many elements, too large. Nothing was sent."""


class ValueTooLarge(ValueRefused):
    """A value is larger than ``value_bytes``."""


class OpaqueValue(NamedTuple):
    """A value that is not plain data, as it crosses: a type's name and a capped repr."""

    type_name: str
    repr: str


class HandleRef(NamedTuple):
    """A reference to a host object: its opaque id and what the guest may ask of it."""

    handle: int
    type_name: str
    methods: tuple[str, ...]
    attributes: tuple[str, ...]
    operators: tuple[str, ...]


#: Turns a value that is not plain data into one that is (`OpaqueValue`, `HandleRef`), or raises `ValueRefused`.
Fallback = Callable[[Any], Any]


def refuse(value: Any) -> NoReturn:
    """The `Fallback` of a sender that must be exact."""
    raise ValueRefused(f"a value of type {type(value).__name__} is not plain data")


class Encoder:
    """Encodes the values of one frame; collects their attachments. Use once per frame."""

    def __init__(self, fallback: Fallback = refuse, *, max_bytes: int | None = None) -> None:
        self.attachments: list[Attachment] = []
        self._fallback = fallback
        self._left = MAX_ELEMENTS
        self._unseeded_left = MAX_UNSEEDED_KEYS
        self._bytes_left = max_bytes
        self._in_key = 0

    def allow(self, max_bytes: int | None) -> None:
        """Begin a new value, which may be this large."""
        self._bytes_left = max_bytes

    def _charge(self, size: int) -> None:
        if self._bytes_left is not None:
            self._bytes_left -= size
            if self._bytes_left < 0:
                raise ValueTooLarge("the value is larger than value_bytes allows")

    def _attach(self, data: Attachment) -> list[Any]:
        if len(self.attachments) >= MAX_ATTACHMENTS:
            raise ValueRefused(f"the value has more than {MAX_ATTACHMENTS} long texts or bytes objects")
        self.attachments.append(data)
        return ["a", len(self.attachments) - 1]

    def _text(self, value: str) -> Any:
        size, valid = len(value), True
        if not value.isascii():
            # Two lone surrogates next to each other would come back from JSON as one character.
            size, valid = _utf8_size(value)
        self._charge(size)
        if valid and (len(value) <= INLINE_CHARS or len(self.attachments) >= MAX_ATTACHMENTS):
            return value
        return self._attach(value)

    def encode(self, value: Any, depth: int = 0) -> Any:
        """The JSON tree of ``value``.

        Raises:
            ValueRefused: it cannot cross.
        """
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return self._text(value)
        if kind is int:
            if -MAX_JSON_INT <= value <= MAX_JSON_INT:
                return value
            self._charge(value.bit_length() // 8)
            return ["i", hex(value)]
        if kind is float:
            if math.isfinite(value):
                return value
            return ["f", "nan" if value != value else "inf" if value > 0 else "-inf"]
        encode_container = _CONTAINERS.get(kind)
        if encode_container is not None:
            return self._container(encode_container, value, depth)
        if kind is bytes:
            self._charge(len(value))
            return self._attach(value)
        if kind is OpaqueValue:
            name = str(value.type_name)[:MAX_OPAQUE_NAME].encode("utf-8", "replace").decode("utf-8")
            return ["o", name, self._text(str(value.repr)[:MAX_OPAQUE_REPR])]
        if kind is HandleRef:
            return ["h", value.handle, value.type_name, list(value.methods), list(value.attributes), list(value.operators)]
        temporal = _temporal(value)
        if temporal is not None:
            return temporal
        base = _plain_base(value)
        if base is not _NOT_PLAIN:
            return self.encode(base, depth)
        replaced = self._fallback(value)
        if type(replaced) not in (OpaqueValue, HandleRef, str):
            raise ValueRefused("a value that is not plain data has no replacement")
        return self.encode(replaced, depth)

    def _key(self, value: Any, depth: int) -> Any:
        if type(value) is str:
            return self._text(value)
        self._in_key += 1
        try:
            return self.encode(value, depth)
        finally:
            self._in_key -= 1

    def _check_hashes(self, keys: Any) -> None:
        """What `Decoder` refuses for its own protection is refused here first, so that no honest sender is killed for it."""
        numbers = [key for key in keys if type(key) is int or type(key) is float]
        if len(numbers) > MAX_EQUAL_HASHES and max(collections.Counter(map(hash, numbers)).values()) > MAX_EQUAL_HASHES:
            raise ValueRefused(f"the value has more than {MAX_EQUAL_HASHES} dict keys or set elements of equal hash; send a list")

    def _container(self, tag: str, value: Any, depth: int) -> list[Any]:
        if depth >= MAX_DEPTH:
            raise ValueRefused(f"the value is nested deeper than {MAX_DEPTH} levels")
        count = len(value)
        self._left -= count * (2 if tag == "d" else 1)
        if self._left < 0:
            raise ValueRefused(f"the value has more than {MAX_ELEMENTS} elements")
        self._charge(count * 2)
        if tag in "dsz":
            self._unseeded_left -= sum(1 for key in value if type(key) is not str)
            if self._unseeded_left < 0:
                raise ValueRefused(
                    f"the value has more than {MAX_UNSEEDED_KEYS} dict keys or set elements that are not text; send a list"
                )
            self._check_hashes(value)
        if self._in_key and tag in "lds":
            # A hashable subclass of list, say: the receiver could not put its plain base into a dict or set.
            raise ValueRefused("a dict key or set element is not hashable as plain data")
        tree: list[Any] = [tag]
        if tag == "d":
            for key, item in value.items():
                tree.append(self._key(key, depth + 1))
                tree.append(self.encode(item, depth + 1))
        elif tag in "sz":
            tree.extend([self._key(item, depth + 1) for item in value])
        else:
            for item in value:
                tree.append(self.encode(item, depth + 1))
        return tree


def _utf8_size(value: str) -> tuple[int, bool]:
    """The size of ``value`` in bytes, and whether it is valid Unicode (has no lone surrogates)."""
    try:
        return len(value.encode("utf-8")), True
    except UnicodeEncodeError:
        return len(value.encode("utf-8", "surrogatepass")), False


_CONTAINERS: Final[dict[type, str]] = {list: "l", tuple: "t", dict: "d", set: "s", frozenset: "z"}
_NOT_PLAIN: Final = object()


def _plain_base(value: Any) -> Any:
    """``value`` as its plain base class, through the base's own methods: a subclass's overrides never run."""
    kind = type(value)
    if issubclass(kind, str):
        return str.__add__(value, "")
    if issubclass(kind, int):
        return int.__add__(value, 0)
    if issubclass(kind, float):
        return float.__pos__(value)
    if issubclass(kind, bytes):
        return bytes.__add__(value, b"")
    if issubclass(kind, list):
        return list(list.__iter__(value))
    if issubclass(kind, tuple):
        return tuple(tuple.__iter__(value))
    if kind is collections.OrderedDict:
        return dict(value.items())  # its order is not that of the dict below it
    if issubclass(kind, dict):
        return dict(dict.items(value))
    if issubclass(kind, set):
        return set(set.__iter__(value))
    if issubclass(kind, frozenset):
        return frozenset(frozenset.__iter__(value))
    return _numpy_scalar(value) if kind.__module__ == "numpy" else _NOT_PLAIN


def _numpy_scalar(value: Any) -> Any:
    """The plain value of a numpy scalar; any class may call itself numpy's, and then its own code runs here."""
    try:
        plain = value.item() if getattr(value, "shape", None) == () else _NOT_PLAIN
    except Exception:  # noqa: BLE001 - foreign code
        return _NOT_PLAIN
    return plain if type(plain) in (bool, int, float, str, bytes) else _NOT_PLAIN


def _temporal(value: Any) -> list[Any] | None:
    kind = type(value)
    if kind is dt.datetime:
        offset = _fixed_offset(value.tzinfo)
        if offset is _NOT_PLAIN:
            return None
        return [
            "D", value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond, value.fold, offset,
        ]  # fmt: skip
    if kind is dt.date:
        return ["Y", value.year, value.month, value.day]
    if kind is dt.time:
        offset = _fixed_offset(value.tzinfo)
        if offset is _NOT_PLAIN:
            return None
        return ["T", value.hour, value.minute, value.second, value.microsecond, value.fold, offset]
    if kind is dt.timedelta:
        return ["E", value.days, value.seconds, value.microseconds]
    if kind is dt.timezone:
        offset = _fixed_offset(value)
        return None if offset is _NOT_PLAIN else ["Z", offset]
    return None


def _fixed_offset(zone: dt.tzinfo | None) -> Any:
    """None, or [seconds, microseconds, name or None] of a fixed-offset zone; named zones are not plain data."""
    if zone is None:
        return None
    if type(zone) is not dt.timezone:
        return _NOT_PLAIN
    offset = zone.utcoffset(None)
    seconds = offset.days * 86_400 + offset.seconds
    # __getinitargs__ has the name only when one was given.
    args = zone.__getinitargs__()  # type: ignore[attr-defined]
    name = args[1] if len(args) > 1 else None
    if name is not None and not _can_name_a_zone(name):
        return _NOT_PLAIN  # it could not be sent exactly
    return [seconds, offset.microseconds, name]


def _can_name_a_zone(name: str) -> bool:
    return len(name) <= MAX_OPAQUE_NAME and _utf8_size(name)[1]


class Decoder:
    """Decodes the values of one frame. Counts elements over the whole frame."""

    def __init__(self, attachments: Sequence[Attachment], *, allow_handles: bool = False) -> None:
        self._attachments = attachments
        self._allow_handles = allow_handles
        self._used: set[int] = set()
        self._left = MAX_ELEMENTS
        self._unseeded_left = MAX_UNSEEDED_KEYS

    @property
    def elements(self) -> int:
        """How many elements the values decoded so far have."""
        return MAX_ELEMENTS - self._left

    def decode(self, tree: Any, depth: int = 0) -> Any:
        """The value of a JSON tree made by `Encoder.encode`.

        Raises:
            WireError: the tree is not one that `Encoder` makes.
        """
        kind = type(tree)
        if tree is None or kind in (bool, str, int):
            return tree
        if kind is float:
            if not math.isfinite(tree):
                raise WireError("a float that is not finite must be tagged")
            return tree
        if kind is not list or not tree or type(tree[0]) is not str:
            raise WireError("a value is neither a scalar nor a tagged array")
        decode = _DECODERS.get(tree[0])
        if decode is None:
            raise WireError("a value has an unknown tag")
        if depth > MAX_DEPTH:
            raise WireError("a value is nested too deeply")
        self._left -= len(tree) - 1
        if self._left < 0:
            raise WireError("a value has too many elements")
        return decode(self, tree, depth + 1)

    def _items(self, tree: list[Any], depth: int) -> list[Any]:
        return [self.decode(item, depth) for item in tree[1:]]

    def _key(self, tree: Any, depth: int, digests: dict[int, int]) -> Any:
        key = self.decode(tree, depth)
        if type(key) is str:
            return key
        # Only text and bytes hash with a secret seed: the others let a guest choose keys that collide and turn
        # building a dict into quadratic work on the host.
        self._unseeded_left -= 1
        if self._unseeded_left < 0:
            raise WireError("a value has too many keys that are not text")
        try:
            digest = hash(key)  # the depth is bounded, so this cannot overflow the stack
        except TypeError:
            raise WireError("a dict key or set element is not hashable") from None
        same = digests.get(digest, 0) + 1
        if same > MAX_EQUAL_HASHES:
            raise WireError("a value has too many keys of equal hash")
        digests[digest] = same
        return key

    def _keys(self, tree: list[Any], depth: int) -> list[Any]:
        digests: dict[int, int] = {}
        return [self._key(item, depth, digests) for item in tree[1:]]

    def _dict(self, tree: list[Any], depth: int) -> dict[Any, Any]:
        if len(tree) % 2 == 0:
            raise WireError("a dict has a key without a value")
        result: dict[Any, Any] = {}
        digests: dict[int, int] = {}
        for index in range(1, len(tree), 2):
            key = self._key(tree[index], depth, digests)
            result[key] = self.decode(tree[index + 1], depth)
        return result

    def _attachment(self, tree: list[Any], depth: int) -> Attachment:
        (index,) = _fields(tree, int)
        if not 0 <= index < len(self._attachments):
            raise WireError("a value names an attachment that is not there")
        if index in self._used:
            # One attachment named a million times would make a small frame a huge value for whoever writes it out.
            raise WireError("a value names an attachment twice")
        self._used.add(index)
        attachment: Attachment = self._attachments[index]
        return attachment

    def _handle(self, tree: list[Any], depth: int) -> HandleRef:
        if not self._allow_handles:
            raise WireError("a handle is not allowed here")
        handle, type_name, *lists = _fields(tree, int, str, list, list, list)
        for names in lists:
            if not all(type(name) is str for name in names):
                raise WireError("a handle's names must be text")
        return HandleRef(handle, type_name, tuple(lists[0]), tuple(lists[1]), tuple(lists[2]))

    def _opaque(self, tree: list[Any], depth: int) -> OpaqueValue:
        if len(tree) != 3 or type(tree[1]) is not str:
            raise WireError("an opaque value is malformed")
        text = self.decode(tree[2], depth)
        if type(text) is not str:
            raise WireError("an opaque value is malformed")
        return OpaqueValue(tree[1][:MAX_OPAQUE_NAME], text[:MAX_OPAQUE_REPR])


def _fields(tree: list[Any], *kinds: type) -> list[Any]:
    values = tree[1:]
    if len(values) != len(kinds) or any(type(value) is not kind for value, kind in zip(values, kinds, strict=True)):
        raise WireError("a tagged value has the wrong fields")
    return values


def _big_int(decoder: Decoder, tree: list[Any], depth: int) -> int:
    (text,) = _fields(tree, str)
    try:
        return int(text, 16)
    except ValueError:
        raise WireError("an integer is malformed") from None


def _special_float(decoder: Decoder, tree: list[Any], depth: int) -> float:
    (text,) = _fields(tree, str)
    if text not in ("nan", "inf", "-inf"):
        raise WireError("a float is malformed")
    return float(text)


def _zone(offset: Any) -> dt.timezone | None:
    if offset is None:
        return None
    if type(offset) is not list or len(offset) != 3 or type(offset[0]) is not int or type(offset[1]) is not int:
        raise WireError("a timezone is malformed")
    delta = dt.timedelta(seconds=offset[0], microseconds=offset[1])
    if offset[2] is None:
        return dt.timezone(delta)
    if type(offset[2]) is not str or not _can_name_a_zone(offset[2]):
        raise WireError("a timezone is malformed")
    return dt.timezone(delta, offset[2])


def _build_datetime(numbers: list[int], zone: dt.timezone | None) -> dt.datetime:
    return dt.datetime(*numbers[:7], tzinfo=zone, fold=numbers[7])  # type: ignore[arg-type,misc]


def _build_time(numbers: list[int], zone: dt.timezone | None) -> dt.time:
    return dt.time(*numbers[:4], tzinfo=zone, fold=numbers[4])  # type: ignore[arg-type,misc]


def _build_timezone(numbers: list[int], zone: dt.timezone | None) -> dt.timezone:
    if zone is None:
        raise WireError("a timezone is malformed")
    return zone


def _temporal_decoder(count: int, zoned: bool, build: Callable[[list[int], dt.timezone | None], Any]) -> _Decode:
    """A decoder for ``count`` whole numbers, followed by a fixed offset if ``zoned``."""

    def decode(decoder: Decoder, tree: list[Any], depth: int) -> Any:
        numbers = tree[1 : 1 + count]
        if len(tree) != 1 + count + zoned or any(type(number) is not int for number in numbers):
            raise WireError("a date or time is malformed")
        try:
            return build(numbers, _zone(tree[-1]) if zoned else None)
        except (ValueError, OverflowError):
            raise WireError("a date or time is out of range") from None

    return decode


_Decode = Callable[[Decoder, list[Any], int], Any]

_DECODERS: Final[dict[str, _Decode]] = {
    "l": lambda decoder, tree, depth: decoder._items(tree, depth),
    "t": lambda decoder, tree, depth: tuple(decoder._items(tree, depth)),
    "s": lambda decoder, tree, depth: set(decoder._keys(tree, depth)),
    "z": lambda decoder, tree, depth: frozenset(decoder._keys(tree, depth)),
    "d": lambda decoder, tree, depth: decoder._dict(tree, depth),
    "a": lambda decoder, tree, depth: decoder._attachment(tree, depth),
    "i": _big_int,
    "f": _special_float,
    "o": lambda decoder, tree, depth: decoder._opaque(tree, depth),
    "h": lambda decoder, tree, depth: decoder._handle(tree, depth),
    "D": _temporal_decoder(8, True, _build_datetime),
    "T": _temporal_decoder(5, True, _build_time),
    "Y": _temporal_decoder(3, False, lambda numbers, zone: dt.date(*numbers)),
    "E": _temporal_decoder(3, False, lambda numbers, zone: dt.timedelta(numbers[0], numbers[1], numbers[2])),
    "Z": _temporal_decoder(0, True, _build_timezone),
}
