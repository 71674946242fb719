"""The modules a restricted cell can import: facades of a session's own, with chosen functions of the real ones.

A real module never reaches a cell: it leads to others, and a change to it would be seen by every session and by the host.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import calendar
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime as dt
import decimal
import difflib
import fractions
import functools
import hashlib
import heapq
import html
import importlib
import io
import itertools
import json
import math
import operator
import pprint
import random
import re
import statistics
import string
import sys
import textwrap
import time
import tomllib
import typing
import unicodedata
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from .classes import GuestClass, make_enum
from .guards import Guards
from .names import exit_cell
from .transformer import ELSEWHERE

__all__ = ("MODULE_NAMES", "Importer", "make_modules")

#: Module to the names taken from it as they are.
_TAKEN: Final[dict[ModuleType, str]] = {
    base64: "b16decode b16encode b32decode b32encode b64decode b64encode urlsafe_b64decode urlsafe_b64encode",
    binascii: "Error crc32 hexlify unhexlify",
    bisect: "bisect bisect_left bisect_right insort insort_left insort_right",
    calendar: "isleap leapdays monthcalendar monthrange timegm weekday",
    collections: "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    contextlib: "contextmanager nullcontext suppress",
    copy: "copy deepcopy",
    csv: "DictReader DictWriter QUOTE_ALL QUOTE_MINIMAL QUOTE_NONE QUOTE_NONNUMERIC reader writer",
    dataclasses: "asdict astuple field fields is_dataclass replace",
    dt: "MAXYEAR MINYEAR UTC date datetime time timedelta timezone tzinfo",
    decimal: "Decimal InvalidOperation ROUND_CEILING ROUND_DOWN ROUND_FLOOR ROUND_HALF_EVEN ROUND_HALF_UP ROUND_UP",
    difflib: "SequenceMatcher context_diff get_close_matches ndiff unified_diff",
    fractions: "Fraction",
    functools: "cache cached_property cmp_to_key lru_cache partial reduce",
    hashlib: "blake2b blake2s md5 sha1 sha224 sha256 sha3_256 sha3_512 sha384 sha512",
    heapq: "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest",
    html: "escape unescape",
    io: "BytesIO StringIO",
    itertools: "accumulate chain combinations combinations_with_replacement compress count cycle dropwhile filterfalse groupby islice "
    "pairwise permutations product repeat starmap takewhile tee zip_longest",
    json: "JSONDecodeError dumps loads",
    math: " ".join(name for name in dir(math) if not name.startswith("_") and name not in ("comb", "factorial", "perm")),
    operator: "add and_ concat contains countOf eq floordiv ge gt indexOf inv is_ is_not itemgetter le lt mod mul ne neg not_ or_ "
    "pos sub truediv truth xor",
    pprint: "pformat",
    re: "A ASCII DOTALL I IGNORECASE M MULTILINE Match NOFLAG Pattern S U UNICODE VERBOSE X compile error escape findall finditer "
    "fullmatch match search split sub subn",
    statistics: "StatisticsError fmean geometric_mean harmonic_mean mean median median_high median_low mode multimode pstdev "
    "pvariance quantiles stdev variance",
    string: "ascii_letters ascii_lowercase ascii_uppercase capwords digits hexdigits octdigits printable punctuation whitespace",
    sys: "maxsize version version_info",
    textwrap: "dedent fill indent shorten wrap",
    time: "gmtime localtime monotonic perf_counter process_time strftime strptime time time_ns",
    tomllib: "TOMLDecodeError loads",
    typing: "Any Callable ClassVar Dict Final FrozenSet Generator Generic Iterable Iterator List Literal Mapping NamedTuple Optional "
    "Protocol Sequence Set Tuple TypeVar TypedDict Union cast",
    unicodedata: "category combining decomposition name normalize numeric",
    zlib: "adler32 crc32",
}  # fmt: skip
#: Classes of these would have a metaclass of their own, and generic ones are no base for a cell's class.
_NOT_TAKEN: Final = {"Generic", "NamedTuple", "Protocol", "TypedDict"}
_RANDOM: Final = "betavariate choice choices expovariate gauss getrandbits randbytes randint random randrange sample seed shuffle triangular uniform"
MODULE_NAMES: Final = tuple(sorted([*(module.__name__ for module in _TAKEN), "enum", "random"]))
#: Modules that functions in C import by themselves, through the cell's ``__import__``, whose answer they do not look at.
_OF_THE_INTERPRETER: Final = ("_strptime",)
for _name in _OF_THE_INTERPRETER:
    importlib.import_module(_name)
#: Whose globals `dataclasses` gives to the code it makes: it has none.
_NOWHERE: Final = sys.modules.setdefault("rlm_restricted_cell", ModuleType("rlm_restricted_cell"))
#: Arguments of functions whose results grow without bound.
_MAX_COUNT: Final = 5_000


class _Facade:
    """A module as a cell sees it. Frozen: it is the session's, but its functions are everybody's."""

    __slots__ = ("__dict__", "_module")

    def __init__(self, name: str, members: dict[str, Any]) -> None:
        self.__dict__.update(members)
        self._module = name

    def __repr__(self) -> str:
        return f"<module {self._module!r} (restricted)>"


_Facade.__name__ = _Facade.__qualname__ = "module"  # what a cell, and `names()`, see of it


class Importer:
    """``__import__`` of a session."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self._modules = modules

    def __call__(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: A002
        module = self._modules.get(name) if type(name) is str and level == 0 else None
        if module is None:
            raise ImportError(
                f"the module {str(name)[:100]!r} is not in the restricted language, which has {', '.join(MODULE_NAMES)}; {ELSEWHERE}"
            )
        if name in _OF_THE_INTERPRETER:
            return module
        for member in fromlist or ():
            if type(member) is not str or member not in vars(module):
                raise ImportError(f"cannot import {str(member)[:100]!r} from {name!r} in the restricted language")
        return module


class _Stream:
    """``sys.stdout`` and ``sys.stderr`` of a cell."""

    __slots__ = ("_write",)

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def write(self, text: str) -> int:
        """Write a text."""
        if not isinstance(text, str):
            raise TypeError(f"write() takes a str, not {type(text).__name__}")
        self._write(str(text))
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""


def make_modules(guards: Guards, write: Callable[[str, str], None], sleep: Callable[[float], None]) -> dict[str, Any]:
    """The facades of one session, by name. ``write`` takes a stream's name and a text."""
    own: dict[str, dict[str, Any]] = {
        module.__name__: {name: getattr(module, name) for name in names.split() if name not in _NOT_TAKEN and hasattr(module, name)}
        for module, names in _TAKEN.items()
    }
    generator = random.Random()  # noqa: S311 - a cell's own, for its own ends
    own["random"] = {name: getattr(generator, name) for name in _RANDOM.split()}
    own.update((name, {}) for name in _OF_THE_INTERPRETER)
    own["__future__"] = {"annotations": None}
    own["time"]["sleep"] = sleep
    own["enum"] = make_enum()
    own["sys"].update(
        exit=exit_cell, stdout=_Stream(lambda text: write("stdout", text)), stderr=_Stream(lambda text: write("stderr", text))
    )
    own["math"].update((name, _bounded_count(name, getattr(math, name))) for name in ("comb", "factorial", "perm"))
    own["functools"].update(wraps=_wraps(guards), reduce=_reduce(guards))
    own["operator"]["attrgetter"] = _attrgetter(guards)
    own["collections"].update(deque=collections.deque)
    own["dataclasses"]["dataclass"] = _dataclass
    own["pprint"]["pprint"] = lambda value: write("stdout", pprint.pformat(value) + "\n")
    return {name: _Facade(name, members) for name, members in own.items()}


def _bounded_count(name: str, function: Callable[..., int]) -> Callable[..., int]:
    def bounded(*args: int) -> int:
        if any(isinstance(arg, int) and arg > _MAX_COUNT for arg in args[:1]):
            raise OverflowError(f"math.{name} takes at most {_MAX_COUNT:,} in the restricted language")
        return function(*args)

    return bounded


def _reduce(guards: Guards) -> Callable[..., Any]:
    def reduce(function: Callable[[Any, Any], Any], items: Any, *initial: Any) -> Any:
        return functools.reduce(function, guards.bounded(items), *initial)

    return reduce


def _wraps(guards: Guards) -> Callable[..., Any]:
    """`functools.wraps` writes to the function it is given, which must be the cell's own."""

    def wraps(wrapped: Any) -> Callable[[Any], Any]:
        def decorate(wrapper: Any) -> Any:
            guards.write(wrapper).__name__ = guards.getattr(wrapped, "__name__")
            return wrapper

        return decorate

    return wraps


def _attrgetter(guards: Guards) -> Callable[..., Any]:
    """`operator.attrgetter` walks attributes without a guard."""

    def attrgetter(*paths: str) -> Callable[[Any], Any]:
        def walk(obj: Any, path: str) -> Any:
            for name in path.split("."):
                obj = guards.getattr(obj, name)
            return obj

        return lambda obj: walk(obj, paths[0]) if len(paths) == 1 else tuple(walk(obj, path) for path in paths)

    return attrgetter


def _dataclass(cls: Any = None, /, **options: Any) -> Any:
    """`dataclasses.dataclass`, which makes source code of the names of fields and runs it in the globals of the class's module."""
    if cls is None:
        return lambda cls: _dataclass(cls, **options)
    if type(cls) is not GuestClass:
        raise TypeError("dataclass() takes a class of the cell")
    # A copy of what was looked at is what is used: a dict of the cell's own making may say something else when it is read again.
    annotations = vars(cls).get("__annotations__", {})
    fields: dict[Any, Any] = dict(annotations) if type(annotations) is dict else {None: None}
    for name in fields:
        if type(name) is not str or not name.isidentifier() or name.startswith("__"):
            raise TypeError(f"a field cannot have the name {str(name)[:100]!r}")
    cls.__annotations__ = fields
    doc = vars(cls).get("__doc__")
    if type(doc) is not str or not doc:  # else it is made of a signature, for which the texts of base classes are evaluated
        cls.__doc__ = f"{cls.__name__}({', '.join(fields)})"
    module = cls.__module__
    cls.__module__ = _NOWHERE.__name__
    try:
        made: Any = dataclasses.dataclass(**options)(cls)
    finally:
        cls.__module__ = module
    if made is not cls:  # slots=True
        made.__module__ = module
    return made
