"""What a guest is told about a feature this subset of Python lacks: its name, and which backends have it.

The engine's errors are those of CPython where it can: a method that it lacks "does not exist". Whether a name, an argument
or an operand is a feature of Python, which the subset lacks, or a mistake is asked of the host's own Python, by looking it
up; what a guest wrote is only ever a key. The text it gets can fool nobody but itself.
"""

from __future__ import annotations

import builtins
import codecs
import collections
import datetime as dt
import decimal
import functools
import importlib
import inspect
import json
import operator
import re
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final

from ...protocol import Feature
from ...registry import backends_with

__all__ = ("missing_module", "remedy", "with_remedy")

#: Errors are read this far.
_READ_CHARS: Final = 400
#: How the engine names syntax it lacks, and the declared feature that has it.
_SYNTAX: Final = (
    ("class inheritance", Feature.INHERITANCE), ("yield", Feature.GENERATORS), ("'del'", Feature.DEL),
)  # fmt: skip
#: Modules the subset has in part.
_MODULES: Final = (
    "asyncio", "base64", "binascii", "bisect", "collections", "copy", "csv", "dataclasses", "datetime", "decimal", "functools",
    "hashlib", "itertools", "json", "math", "os", "pathlib", "random", "re", "sys", "time", "tomllib", "typing", "unicodedata", "_io",
)  # fmt: skip
_ATTRIBUTE: Final = re.compile(
    r"AttributeError: (?:'([\w.]{1,60})' object|type object '([\w.]{1,60})'|module '(\w{1,20})') has no attribute '(\w{1,60})'"
)
_NAME: Final = re.compile(r"NameError: name '(\w{1,60})' is not defined")
_IMPORTED_NAME: Final = re.compile(r"ImportError: cannot import name '(\w{1,60})' from '(\w{1,20})'")
_SUBMODULE: Final = re.compile(r"ModuleNotFoundError: No module named '([\w.]{1,60})'")
_KEYWORD: Final = re.compile(r"TypeError: ([\w.]{1,60})\(\) got an unexpected keyword argument '(\w{1,60})'")
_COUNT: Final = re.compile(r"TypeError: ([\w.]{1,60})\(\) takes .{1,60} \((\d{1,3}) given\)")
_OPERANDS: Final = re.compile(
    r"TypeError: unsupported operand type\(s\) for (\S{1,3})(?: or pow\(\))?: '([\w.]{1,60})' and '([\w.]{1,60})'"
)
_COMPARED: Final = re.compile(r"TypeError: '([<>]=?)' not supported between instances of '([\w.]{1,60})' and '([\w.]{1,60})'")
_ENCODING: Final = re.compile(r"LookupError: unknown encoding: ([\w-]{1,40})")
#: Other errors that mean a gap and no mistake: how they begin, and which feature has it.
_GAPS: Final = (
    ("TypeError: cannot convert 'list' object to bytes", Feature.CPYTHON),
    ("TypeError: cannot convert 'tuple' object to bytes", Feature.CPYTHON),
    ("TypeError: cannot convert 'range' object to bytes", Feature.CPYTHON),
    ("TypeError: cannot create 'object' instances", Feature.CPYTHON),
    ("TypeError: cannot create 'property' instances", Feature.CPYTHON),
    ("TypeError: first argument must be string or compiled pattern", Feature.CPYTHON),  # a bytes pattern
    ("ValueError: pow() 2nd argument cannot be negative when 3rd argument specified", Feature.CPYTHON),
    ("RuntimeError: Internal error in monty:", Feature.CPYTHON),
    ("PermissionError: Permission denied: '", Feature.FILES),
    ("PermissionError: [Errno 13] Permission denied: '", Feature.FILES),
)
_NOT_SUPPORTED_HERE: Final = re.compile(r"RuntimeError: '[\w.]{1,60}' is not supported in this environment")
_IN_A_CALLBACK: Final = "cannot suspend in this synchronous context"
_IS_A_LIST: Final = "TypeError: 'list' object is not an iterator"
_OPERATORS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod,
    "**": operator.pow, "&": operator.and_, "|": operator.or_, "^": operator.xor, "<<": operator.lshift, ">>": operator.rshift,
    "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
#: One harmless value of each type that operators are tried with.
_SAMPLES: Final[dict[str, Any]] = {
    "int": 1, "bool": True, "float": 1.5, "complex": 1j, "str": "a", "bytes": b"a", "list": [1], "tuple": (1,), "dict": {1: 1},
    "set": {1}, "frozenset": frozenset({1}), "dict_keys": {1: 1}.keys(), "dict_items": {1: 1}.items(), "type": int,
    "datetime.timedelta": dt.timedelta(1), "datetime.date": dt.date(2024, 1, 1),
    "datetime.datetime": dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "decimal.Decimal": decimal.Decimal(1),
    "collections.Counter": collections.Counter("a"), "collections.deque": collections.deque([1]),
    "collections.defaultdict": collections.defaultdict(int),
}  # fmt: skip


def remedy(feature: Feature) -> str:
    """The sentence that ends an error about a feature this backend does not have."""
    return f"use a backend whose capabilities list {feature.value!r}: {' or '.join(backends_with(feature))}"


def missing_module(name: str) -> str:
    """What a guest is told about a module it cannot import: only the standard library is another backend's for certain."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return f"No module named {name!r} in this subset of Python; {remedy(Feature.IMPORTS)}"
    return f"No module named {name!r}"


def with_remedy(name: str, text: str) -> str:
    """An uncaught error's text, with the remedy if it speaks of something that this subset lacks.

    Args:
        name: the error's type.
        text: ``"Type: message"``, the guest's words.
    """
    start = text[:_READ_CHARS]
    if name == "NotImplementedError" and _IN_A_CALLBACK in start:
        return (
            f"{text}: call the host in a loop or a comprehension, [f(x) for x in xs], and sort by what it returned, or "
            f"{remedy(Feature.CPYTHON)}"
        )
    if start == _IS_A_LIST:
        return (
            f"{text}: in this subset of Python a generator expression, map(), filter() and zip() give a list; write iter(...) "
            f"around it, or {remedy(Feature.GENERATORS)}"
        )
    if name == "AttributeError":
        return _attribute(start, text)
    feature = _feature(name, start)
    return text if feature is None else f"{text}{_where(text)}; {remedy(feature)}"


def _where(text: str) -> str:
    return "" if "not yet support" in text or "in this subset" in text else " in this subset of Python"


def _feature(name: str, start: str) -> Feature | None:
    """The feature whose absence an error's text speaks of."""
    if name in ("NotImplementedError", "TypeError", "SyntaxError") and _speaks_of_support(start):
        return next((feature for words, feature in _SYNTAX if words in start), Feature.CPYTHON)
    if found := _NAME.fullmatch(start):
        return Feature.CPYTHON if hasattr(builtins, found[1]) else None
    if found := _IMPORTED_NAME.match(start):
        return Feature.CPYTHON if found[1] in _module_names(found[2]) else None
    if found := _SUBMODULE.match(start):
        return Feature.IMPORTS if "." in found[1] and found[1].partition(".")[0] in _MODULES else None
    if found := _KEYWORD.fullmatch(start):
        return Feature.CPYTHON if _takes_keyword(found[1], found[2]) else None
    if found := _COUNT.fullmatch(start):
        return Feature.CPYTHON if _takes(found[1], int(found[2])) else None
    if found := _OPERANDS.match(start):
        return Feature.CPYTHON if _works(found[1].rstrip("="), found[2], found[3]) else None
    if found := _COMPARED.fullmatch(start):
        return Feature.CPYTHON if _works(found[1], found[2], found[3]) else None
    if found := _ENCODING.match(start):
        return Feature.CPYTHON if _is_encoding(found[1]) else None
    if _NOT_SUPPORTED_HERE.match(start):
        return Feature.CPYTHON
    return next((feature for words, feature in _GAPS if start.startswith(words)), None)


def _speaks_of_support(start: str) -> bool:
    # "'<' not supported between instances of 'int' and 'str'" is CPython's own error.
    return "not yet support" in start or ("not supported" in start and "not supported between" not in start)


# ---- attributes

#: Methods that exist when they are called, so that their absence means that one was used as a value.
_CALLED: Final = (frozenset(dir(str)) | frozenset(dir(list)) | frozenset(dir(dict))) - {"translate", "maketrans"}
_OF_EVERYTHING: Final = frozenset(dir(FunctionType)) | frozenset(dir(type)) | {"__next__", "__len__", "__iter__", "__weakref__"}


def _attribute(start: str, text: str) -> str:
    found = _ATTRIBUTE.fullmatch(start)
    if found is None:
        return text
    instance, kind, module, attribute = found.groups()
    owner = instance or kind or ""
    known = _module_names(module) if module else _type_names(owner)
    if attribute not in known and not (attribute.startswith("__") and attribute in _OF_EVERYTHING):
        return text
    if owner in _BUILTIN_TYPES and attribute in _CALLED and not attribute.startswith("_"):
        return f"{text} as a value in this subset of Python: write lambda x: ..., or {remedy(Feature.CPYTHON)}"
    return f"{text} in this subset of Python; {remedy(Feature.CPYTHON)}"


_BUILTIN_TYPES: Final = frozenset({"str", "bytes", "int", "float", "list", "tuple", "dict", "set", "frozenset"})
_OWN_NAMES: Final[dict[str, type]] = {
    "function": FunctionType, "re.Match": re.Match, "re.Pattern": re.Pattern, "list_iterator": type(iter([])),
    "_io.TextIOWrapper": type(sys.__stdout__),
}  # fmt: skip


@functools.cache
def _module_names(module: str) -> frozenset[str]:
    return frozenset(dir(importlib.import_module(module))) if module in _MODULES else frozenset()


@functools.cache
def _type(name: str) -> type | None:
    """The host's type of the name that the engine gives it: ``str``, ``datetime.date``, ``Random``."""
    module, _, plain = name.rpartition(".")
    places = (module,) if module else ("builtins", *_MODULES)
    found = _OWN_NAMES.get(name)
    for place in places:
        if found is None and (place == "builtins" or place in _MODULES):
            here = getattr(importlib.import_module(place), plain, None)
            found = here if isinstance(here, type) else None
    return found


@functools.cache
def _type_names(name: str) -> frozenset[str]:
    return frozenset(dir(_type(name) or ())) if _type(name) else frozenset()


# ---- arguments


@functools.cache
def _function(name: str) -> Any:
    """The host's function of the name in an engine's error: ``round``, ``Pattern.findall``, ``dumps``."""
    owner, _, plain = name.rpartition(".")
    if owner:
        kind = _type(owner)
        return None if kind is None else getattr(kind, plain, None)
    return next(
        (found for place in ("builtins", *_MODULES) if callable(found := getattr(importlib.import_module(place), plain, None))),
        None,
    )


@functools.cache
def _signature(name: str) -> inspect.Signature | None:
    function = _function(name)
    try:
        return None if function is None else inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _takes_keyword(name: str, keyword: str) -> bool:
    if name.startswith("JSON"):  # the engine's dumps() and loads() speak in the name of their classes
        return any(keyword in inspect.signature(function).parameters for function in (json.dumps, json.loads))
    signature = _signature(name)
    return signature is not None and keyword in signature.parameters


def _takes(name: str, count: int) -> bool:
    signature = _signature(name)
    try:
        return signature is not None and signature.bind(*[None] * (count + ("." in name))) is not None
    except TypeError:
        return False


def _works(sign: str, left: str, right: str) -> bool:
    apply = _OPERATORS.get(sign)
    if apply is None or left not in _SAMPLES or right not in _SAMPLES:
        return False
    try:
        apply(_SAMPLES[left], _SAMPLES[right])
    except TypeError:
        return False
    return True


def _is_encoding(name: str) -> bool:
    try:
        codecs.lookup(name)
    except LookupError:
        return False
    return True
