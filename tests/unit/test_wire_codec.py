"""The codec: exact or refused, and hostile trees raise `WireError` and nothing else."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import json
import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_sandbox.wire import codec
from rlm_sandbox.wire.codec import Decoder, Encoder, HandleRef, OpaqueValue, ValueRefused, WireError

from ..values import plain_values, same


def crossed(value: Any, **kwargs: Any) -> Any:
    """``value`` after a trip through the tree, JSON text and the attachments."""
    encoder = Encoder(**kwargs)
    tree = json.loads(json.dumps(encoder.encode(value), allow_nan=False, ensure_ascii=False))
    return Decoder(encoder.attachments).decode(tree)


@settings(max_examples=200)
@given(plain_values())
def test_plain_values_cross_exactly(value: Any) -> None:
    assert same(crossed(value), value)


@pytest.mark.parametrize(
    "value",
    [
        2**53, 2**53 + 1, -(2**53), -(2**53) - 1, 7**9_000, -0.0, 5e-324, 1.7976931348623157e308, math.nan, math.inf, -math.inf,
        "\ud800", "\ud83d\ude00", "x" * 511 + "\udfff", "a" * 512, "a" * 513, "\x00\u2028\u2029\"\\", "é" * 5_000,
        b"", b"\xff" * 10_000, (), [], {}, set(), frozenset(), {1: {2: {3: (4, [5])}}}, {(): 1, frozenset(): 2, b"k": 3, None: 4},
        {True: 1}, {1: True}, {1.5: 1}, [True, 1, 1.0], dt.date.min, dt.datetime.max, dt.timedelta.max, dt.timedelta.min,
        dt.UTC, dt.timezone(dt.timedelta(hours=1), "CET"), dt.timezone(dt.timedelta(microseconds=-1)),
        dt.time(1, 2, tzinfo=dt.UTC, fold=1), dt.datetime(2026, 10, 25, 2, fold=1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_edges_cross_exactly(value: Any) -> None:
    assert same(crossed(value), value)
    assert same(crossed([{"k": (value,)}]), [{"k": (value,)}])


def test_long_texts_and_bytes_travel_beside_the_tree() -> None:
    encoder = Encoder()
    tree = encoder.encode(["x" * 10_000, b"raw", "short"])
    assert tree == ["l", ["a", 0], ["a", 1], "short"]
    assert encoder.attachments == ["x" * 10_000, b"raw"]


# ---- subclasses


class Colour(enum.IntEnum):
    RED = 3


class Word(enum.StrEnum):
    A = "a"


class Pair(NamedTuple):
    left: int
    right: str


class Forged(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "forged"

    def __add__(self, other: str) -> str:
        return "forged"

    def isascii(self) -> bool:
        raise AssertionError("an override of the value's class ran")


class ForgedList(list[Any]):
    def __iter__(self) -> Any:
        raise AssertionError("an override of the value's class ran")


class Whole(float):
    pass


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Colour.RED, 3),
        (Word.A, "a"),
        (Pair(1, "x"), (1, "x")),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.defaultdict(int, a=1), {"a": 1}),
        (Forged("true"), "true"),
        (ForgedList([1]), [1]),
        (Whole(1.5), 1.5),
        ({Colour.RED: Pair(1, "x")}, {3: (1, "x")}),
    ],
)
def test_subclasses_cross_as_their_base_without_running_their_code(value: Any, base: Any) -> None:
    assert same(crossed(value), base)


def test_an_ordered_dict_keeps_its_own_order() -> None:
    ordered = collections.OrderedDict([("a", 1), ("b", 2)])
    ordered.move_to_end("a")
    assert list(crossed(ordered)) == ["b", "a"]


# ---- what is refused


@pytest.mark.parametrize(
    "value", [object(), print, 1j, range(3), bytearray(b"x"), memoryview(b"x"), iter([]), Exception("x"), type]
)
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(ValueRefused):
        Encoder().encode(value)
    with pytest.raises(ValueRefused):
        Encoder().encode([{"k": value}])


def test_the_fallback_replaces_what_is_not_plain() -> None:
    encoder = Encoder(lambda value: OpaqueValue(type(value).__name__, "r" * 5_000))
    found = Decoder(encoder.attachments).decode(encoder.encode([1j, {1j: 2}]))
    opaque = OpaqueValue("complex", "r" * codec.MAX_OPAQUE_REPR)
    assert found == [opaque, {opaque: 2}]


def test_a_fallback_cannot_smuggle() -> None:
    with pytest.raises(ValueRefused):
        Encoder(lambda value: [value]).encode(object())


def test_an_opaque_name_with_surrogates_still_crosses() -> None:
    encoder = Encoder(lambda value: OpaqueValue("Strange\ud800", "\ud800"))
    tree = encoder.encode(object())
    json.dumps(tree, ensure_ascii=False).encode("utf-8")
    assert Decoder(encoder.attachments).decode(tree) == OpaqueValue("Strange?", "\ud800")


def test_named_zones_are_not_plain() -> None:
    class Zone(dt.tzinfo):
        def utcoffset(self, when: dt.datetime | None) -> dt.timedelta:
            return dt.timedelta(0)

        dst = utcoffset

        def tzname(self, when: dt.datetime | None) -> str:
            return "ours"

    for value in (dt.datetime(2026, 1, 1, tzinfo=Zone()), dt.time(1, tzinfo=Zone())):
        with pytest.raises(ValueRefused):
            Encoder().encode(value)


@pytest.mark.parametrize("name", ["n" * 201, "\ud800"])
def test_a_zone_whose_name_cannot_cross_exactly_is_refused(name: str) -> None:
    zone = dt.timezone(dt.timedelta(hours=1), name)
    for value in (zone, dt.time(1, tzinfo=zone), dt.datetime(2026, 1, 1, tzinfo=zone)):
        with pytest.raises(ValueRefused):
            Encoder().encode(value)


def test_keys_that_would_not_be_hashable_are_refused_by_the_sender() -> None:
    class Key(list[int]):
        def __hash__(self) -> int:  # type: ignore[override]
            return 1

    for value in ({Key(): 1}, {Key()}, {(1, Key()): 2}):
        with pytest.raises(ValueRefused):
            Encoder().encode(value)
    assert crossed({1: Key([2])}) == {1: [2]}


def nested(depth: int, leaf: Any = None) -> Any:
    value = leaf
    for _ in range(depth):
        value = [value]
    return value


def test_depth_is_bounded() -> None:
    assert crossed(nested(codec.MAX_DEPTH)) == nested(codec.MAX_DEPTH)
    assert crossed(nested(codec.MAX_DEPTH, b"leaf")) == nested(codec.MAX_DEPTH, b"leaf")
    with pytest.raises(ValueRefused):
        Encoder().encode(nested(codec.MAX_DEPTH + 1))
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueRefused):
        Encoder().encode(loop)


def test_a_refused_key_does_not_spoil_the_next_value() -> None:
    """Several answers share one encoder: after a refusal inside a key, lists were taken for keys."""
    encoder = Encoder()
    with pytest.raises(ValueRefused):
        encoder.encode({(object(),): 1})
    assert Decoder(encoder.attachments).decode(encoder.encode([[1], {2}, {3: [4]}])) == [[1], {2}, {3: [4]}]


def test_elements_are_bounded_before_they_are_visited() -> None:
    shared = [0] * 1_000
    with pytest.raises(ValueRefused):
        Encoder().encode([shared] * 1_001)
    with pytest.raises(ValueRefused):
        Encoder().encode([0] * (codec.MAX_ELEMENTS + 1))


@pytest.mark.parametrize(
    ("value", "size"), [("a" * 1_000, 1_000), ("é" * 500, 1_000), ("\U0001f600" * 250, 1_000), (b"a" * 1_000, 1_000)]
)
def test_bytes_are_bounded(value: Any, size: int) -> None:
    assert same(crossed(value, max_bytes=size), value)
    with pytest.raises(ValueRefused):
        Encoder(max_bytes=size - 1).encode(value)


def test_large_integers_count_against_the_bound() -> None:
    with pytest.raises(ValueRefused):
        Encoder(max_bytes=1_000).encode(1 << 80_000)


def test_long_texts_beyond_the_attachments_stay_inline() -> None:
    texts = [f"{n:04d}" + "x" * 600 for n in range(codec.MAX_ATTACHMENTS + 3)]
    encoder = Encoder()
    tree = encoder.encode(texts)
    assert len(encoder.attachments) == codec.MAX_ATTACHMENTS
    assert Decoder(encoder.attachments).decode(tree) == texts
    with pytest.raises(ValueRefused):
        Encoder().encode([b"x"] * (codec.MAX_ATTACHMENTS + 1))


def test_colliding_keys_are_refused_on_both_sides() -> None:
    prime = (1 << 61) - 1
    keys = [n * prime for n in range(codec.MAX_EQUAL_HASHES + 1)]
    assert len({hash(key) for key in keys}) == 1
    for value in (dict.fromkeys(keys), set(keys)):
        with pytest.raises(ValueRefused):
            Encoder().encode(value)
    for tree in (["s", *(["i", hex(key)] for key in keys)], ["d", *(part for key in keys for part in (["i", hex(key)], 1))]):
        with pytest.raises(WireError):
            Decoder([]).decode(tree)
    fewer = keys[:-1]
    assert crossed(set(fewer)) == set(fewer)


def test_keys_without_a_secret_hash_are_bounded_on_both_sides() -> None:
    many = range(codec.MAX_UNSEEDED_KEYS + 1)
    with pytest.raises(ValueRefused):
        Encoder().encode(set(many))
    with pytest.raises(WireError):
        Decoder([]).decode(["s", *many])
    with pytest.raises(WireError):
        Decoder([]).decode(["l", *(["s", n] for n in many)])


# ---- hostile trees


@pytest.mark.parametrize(
    "tree",
    [
        [], [[]], [1], ["?"], ["l", ["?"]], {}, {"a": 1}, ["l", {}], float("nan"), float("inf"),
        ["a"], ["a", 0], ["a", -1], ["a", True], ["a", "0"], ["a", 0, 0], ["a", 1.0],
        ["i"], ["i", 5], ["i", "zz"], ["i", ""], ["f", "1.0"], ["f", "infinity"], ["f", 1],
        ["d", 1], ["d", ["l"], 1], ["d", ["d"], 1], ["s", ["l"]], ["s", ["s"]], ["z", ["t", ["l"]]],
        ["o"], ["o", "T"], ["o", 1, "r"], ["o", "T", 1], ["o", "T", ["l"]], ["o", "T", "r", "x"],
        ["D"], ["D", 1, 1, 1, 0, 0, 0, 0, 0], ["D", 0, 1, 1, 0, 0, 0, 0, 0, None], ["D", 10**40, 1, 1, 0, 0, 0, 0, 0, None],
        ["D", 1, 1, 1, 0, 0, 0, 0, 5, None], ["D", 1, 1, 1, 0, 0, 0, 0, 0, []], ["D", 1, 1, 1, 0, 0, 0, 0, 0, [10**30, 0, None]],
        ["D", 1, 1, 1, 0, 0, 0, 0, 0, [86_400, 0, None]], ["D", 1, 1, 1, 0, 0, 0, 0, 0, [0, 0, 1]], ["D", 1, 1, 1, 0, 0, 0, 0, True, None],
        ["Y", 2026, 2, 30], ["Y", 1.5, 1, 1], ["T", 25, 0, 0, 0, 0, None], ["E", 10**10, 0, 0], ["E", 10**400, 0, 0], ["E", 1],
        ["Z"], ["Z", None], ["Z", [1, 2]], ["Z", 3], ["Z", [0, 0, "n" * 201]], ["Z", [0, 0, "\ud800"]],
        ["h", 1, "T", [], [], []], ["h", 1], ["h", 1, "T", [1], [], []],
    ],
    ids=lambda tree: repr(tree)[:40],
)  # fmt: skip
def test_a_malformed_tree_is_a_wire_error(tree: Any) -> None:
    with pytest.raises(WireError):
        Decoder([]).decode(tree)
    with pytest.raises(WireError):
        Decoder([]).decode(["l", ["t", tree]])


def test_handles_only_where_they_are_allowed() -> None:
    reference = HandleRef(7, "Thing", ("find",), ("size",), ("len",))
    tree = Encoder().encode([reference])
    with pytest.raises(WireError):
        Decoder([]).decode(tree)
    assert Decoder([], allow_handles=True).decode(tree) == [reference]
    for hostile in (["h", "1", "T", [], [], []], ["h", 1, 2, [], [], []], ["h", 1, "T", "ab", [], []], ["h", 1, "T", [[]], [], []]):
        with pytest.raises(WireError):
            Decoder([], allow_handles=True).decode(hostile)


def test_an_attachment_is_named_once() -> None:
    decoder = Decoder(["x" * 1_000, "y"])
    assert decoder.decode(["a", 0]) == "x" * 1_000
    with pytest.raises(WireError):
        decoder.decode(["a", 0])
    with pytest.raises(WireError):
        Decoder(["x"]).decode(["l", ["a", 0], ["a", 0]])


def test_the_budget_holds_over_all_values_of_a_frame() -> None:
    decoder = Decoder([])
    half = ["l", *[0] * (codec.MAX_ELEMENTS // 2 + 1)]
    decoder.decode(half)
    with pytest.raises(WireError):
        decoder.decode(half)


def test_deep_trees_are_refused_before_the_stack_ends() -> None:
    tree: Any = ["l"]
    for _ in range(100_000):
        tree = ["l", tree]
    with pytest.raises(WireError):
        Decoder([]).decode(tree)
    key: Any = ["t"]
    for _ in range(codec.MAX_DEPTH - 2):
        key = ["t", key]
    Decoder([]).decode(["s", key])


_TAGS = st.sampled_from(["l", "t", "s", "z", "d", "a", "i", "f", "o", "h", "D", "T", "Y", "E", "Z", "?", ""])
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, 2026, 86_400, 10**20, "0x1", "nan"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.builds(lambda tag, items: [tag, *items], _TAGS, st.lists(inner, max_size=10))
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=25,
)


@settings(max_examples=300)
@given(tree=_JSON, attachments=st.lists(st.text(max_size=3) | st.binary(max_size=3), max_size=3), handles=st.booleans())
def test_any_tree_decodes_or_is_a_wire_error(tree: Any, attachments: list[str | bytes], handles: bool) -> None:
    try:
        value = Decoder(attachments, allow_handles=handles).decode(tree)
    except WireError:
        return
    # What was accepted is a value that can be sent on.
    Encoder().encode(value)
