"""Semantic 9 of the design: plain data crosses exactly or not at all, everything else is `Opaque`."""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import enum
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings

from rlm_sandbox import Capabilities, Feature, GuestError, Opaque, REPLProtocol, SandboxError, UnsendableValue

from ..conftest import OpenSession, open_variant
from ..values import plain_values, same
from .support import MISSING, needs, ok, run

PLAIN: dict[str, Any] = {
    "none": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "2**53": 2**53 + 1,
    "2**64": 2**64,
    "huge": -(3**5_000),
    "float": 0.1,
    "tiny": 5e-324,
    "minus zero": -0.0,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "empty": "",
    "text": "plain",
    "long": "long " * 5_000,
    "wide": "日本\U0001f600é",
    "nul": "a\x00b",
    "bytes": b"\x00\xff raw",
    "no bytes": b"",
    "list": [1, [2, [3, []]]],
    "tuple": (1, (2,), ()),
    "dict": {"a": 1, 2: "b", None: [3], (1, "t"): {"x": {}}, 1.5: True},
    "set": {1, "two", (3, 4), None},
    "mixed": [{"rows": [(1, "a", None), (2, b"b", 2.5)]}, {1, 2}, -1],
}
TEMPORAL: dict[str, Any] = {
    "date": dt.date(2026, 2, 28),
    "datetime": dt.datetime(2026, 2, 28, 12, 30, 1, 5),
    "aware": dt.datetime(2026, 2, 28, 12, 30, tzinfo=dt.UTC),
    "offset": dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-5, minutes=-30))),
    "time": dt.time(23, 59, 59, 999_999),
    "timedelta": dt.timedelta(days=-3, seconds=7, microseconds=11),
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_values_round_trip(repl: REPLProtocol, value: Any) -> None:
    repl.set("x", value)
    assert same(repl.get("x"), value)
    ok(repl.exec("y = [x]"))
    assert same(repl.get("y"), [value])


@pytest.mark.parametrize("value", TEMPORAL.values(), ids=TEMPORAL)
def test_dates_and_times_round_trip(repl: REPLProtocol, value: Any) -> None:
    repl.set("x", value)
    assert same(repl.get("x"), value)


def test_a_lone_surrogate_crosses_exactly_or_is_refused(repl: REPLProtocol) -> None:
    for text in ("\ud800", "a\udfffb", "\ud83d\ude00"):
        try:
            repl.set("x", text)
        except UnsendableValue:
            continue
        assert same(repl.get("x"), text)
        assert same(run(repl, "n = len(x)", "n"), len(text))


def test_values_pass_through_host_calls_exactly(repl: REPLProtocol) -> None:
    repl.bind("same", lambda value: value)
    for name, value in PLAIN.items():
        repl.set("x", value)
        assert same(run(repl, "y = same(x)", "y"), value), name


def test_types_inside_the_guest(repl: REPLProtocol) -> None:
    for value, name in (
        (True, "bool"),
        (1, "int"),
        (1.0, "float"),
        ("", "str"),
        (b"", "bytes"),
        ((), "tuple"),
        ({}, "dict"),
        (set(), "set"),
    ):
        repl.set("x", value)
        assert run(repl, f"r = isinstance(x, {name})", "r") is True


def test_set_replaces_and_is_an_ordinary_variable(repl: REPLProtocol) -> None:
    repl.set("x", [1])
    ok(repl.exec("x.append(2)"))
    repl.set("y", 1)
    repl.set("y", 2)
    assert (repl.get("x"), repl.get("y")) == ([1, 2], 2)


def test_what_was_set_is_a_copy(repl: REPLProtocol) -> None:
    mine = [1]
    repl.set("x", mine)
    ok(repl.exec("x.append(2)"))
    mine.append(99)
    assert repl.get("x") == [1, 2]


def test_get_of_a_name_that_is_not_there(repl: REPLProtocol) -> None:
    assert repl.get("nothing") is None
    assert repl.get("nothing", 7) == 7
    repl.set("x", None)
    assert repl.get("x", 7) is None


@pytest.mark.parametrize("name", ["print", "len", "session_names"])
def test_get_finds_variables_only(repl: REPLProtocol, name: str) -> None:
    assert repl.get(name, MISSING) is MISSING


@pytest.mark.parametrize("name", ["__builtins__", "__name__"])
def test_names_of_the_interpreter_are_not_for_the_host(repl: REPLProtocol, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        repl.get(name)
    with pytest.raises(ValueError, match=name):
        repl.set(name, 1)


# ---- subclasses cross as their base


class Colour(enum.IntEnum):
    RED = 3


class Pair(NamedTuple):
    left: int
    right: str


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (Pair(1, "x"), (1, "x")),
        (Colour.RED, 3),
        (Text("t"), "t"),
    ],
    ids=["counter", "ordered", "default", "namedtuple", "intenum", "str"],
)
def test_subclasses_cross_as_their_base(repl: REPLProtocol, value: Any, base: Any) -> None:
    repl.set("x", value)
    assert same(repl.get("x"), base)


@needs(Feature.IMPORTS, Feature.INHERITANCE)
def test_subclasses_of_the_guest_cross_as_their_base(repl: REPLProtocol) -> None:
    code = (
        "import collections, enum\n"
        "P = collections.namedtuple('P', 'a b')\n"
        "class E(enum.IntEnum):\n    ONE = 1\n"
        "class S(str):\n    def __str__(self):\n        return 'forged'\n    __repr__ = __str__\n"
        "x = [collections.Counter('aab'), P(1, 2), E.ONE, S('true'), collections.OrderedDict(k=1)]"
    )
    assert same(run(repl, code, "x"), [{"a": 2, "b": 1}, (1, 2), 1, "true", {"k": 1}])


# ---- the rest


def test_what_is_not_plain_data_is_opaque(repl: REPLProtocol) -> None:
    ok(repl.exec("def f():\n    return 1\nboth = [1, f]"))
    found = repl.get("f")
    assert isinstance(found, Opaque)
    assert isinstance(found.type_name, str)
    assert isinstance(found.repr, str)
    inside = repl.get("both")
    assert inside[0] == 1
    assert isinstance(inside[1], Opaque)


@needs(Feature.CLASSES)
def test_an_instance_is_opaque_with_its_type(repl: REPLProtocol) -> None:
    ok(repl.exec("class Thing:\n    def __repr__(self):\n        return 'Thing!'\nthing = Thing()"))
    found = repl.get("thing")
    assert isinstance(found, Opaque)
    assert found.type_name == "Thing"


@needs(Feature.CLASSES)
def test_hostile_reprs_and_names_are_data(repl: REPLProtocol) -> None:
    code = (
        "class Long:\n    def __repr__(self):\n        return 'x' * 10_000_000\n"
        "class Raises:\n    def __repr__(self):\n        raise KeyboardInterrupt\n"
        "class NotText:\n    def __repr__(self):\n        return 3\n"
        "Strange = type('Strange\\x1b[31m' + 'n' * 5_000, (), {})\n"
        "x = [Long(), Raises(), NotText(), Dressed(), Strange()]"
    )
    dressed = "class Dressed:\n    __class__ = int\n    def __int__(self):\n        return 7\n    __index__ = __int__"
    if not repl.exec(dressed).ok:  # a language may refuse it
        ok(repl.exec("class Dressed:\n    pass"))
    ok(repl.exec(code))
    try:
        found = repl.get("x")
    except GuestError:
        found = []  # a repr that raises may be the reader's error; it must not be the host's
    for item in found:
        assert isinstance(item, Opaque)
        assert len(item.type_name) <= 200
        assert len(item.repr) <= 2_000
    assert run(repl, "y = 1", "y") == 1


def test_a_self_referential_value_does_not_hang(repl: REPLProtocol) -> None:
    ok(repl.exec("loop = [1]\nloop.append(loop)"))
    with contextlib.suppress(SandboxError):
        repl.get("loop")
    assert run(repl, "y = 1", "y") == 1


# ---- what a host may not send


@pytest.mark.parametrize("value", [print, lambda: 1, int, Pair], ids=["builtin", "lambda", "type", "class"])
def test_set_of_a_callable_names_bind(repl: REPLProtocol, value: Any) -> None:
    with pytest.raises(TypeError, match="bind"):
        repl.set("x", value)
    assert repl.get("x", MISSING) is MISSING


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _numbers() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    "value",
    [object(), [1, object()], {"f": print}, 1j, _numbers(), _nested(200), bytearray(b"x"), Opaque("T", "<T>")],
    ids=["object", "inside", "callable inside", "complex", "generator", "deep", "bytearray", "opaque"],
)
def test_set_of_anything_else_is_unsendable(repl: REPLProtocol, value: Any) -> None:
    with pytest.raises(UnsendableValue):
        repl.set("x", value)
    assert repl.get("x", MISSING) is MISSING


def test_set_of_a_loop_is_unsendable(repl: REPLProtocol) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UnsendableValue):
        repl.set("x", loop)


@pytest.fixture(scope="module")
def shared(backend: str) -> Iterator[REPLProtocol]:
    """One session for all of hypothesis' examples."""
    from rlm_sandbox import Grade

    with open_variant(backend, accept=Grade.NONE, trusted=True) as repl:
        yield repl


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(value=plain_values())
def test_any_plain_value_round_trips(shared: REPLProtocol, value: Any) -> None:
    try:
        shared.set("x", value)
    except UnsendableValue:
        return  # exactly or not at all
    assert same(shared.get("x"), value)


def test_the_context_route_is_declared(capabilities: Capabilities) -> None:
    assert capabilities.context_route in ("mapped", "host_calls", "streamed", "object")


def test_large_values_cross(open_session: OpenSession) -> None:
    repl = open_session()
    text = "0123456789abcdef" * 250_000
    repl.set("x", text)
    assert run(repl, "r = len(x)", "r") == 4_000_000
    assert repl.get("x") == text
