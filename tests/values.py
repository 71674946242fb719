"""Plain values for tests: a strategy for all of them, and equality that tells 1 from True and NaN from itself."""

from __future__ import annotations

import datetime as dt
import math
from typing import Any

from hypothesis import strategies as st


def same(left: Any, right: Any) -> bool:
    """True if both are the same plain value of the same types, NaN and the sign of zero included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (left == right and math.copysign(1, left) == math.copysign(1, right))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        # Order is part of a dict's value here: the guest's code iterates over it.
        return len(left) == len(right) and all(same(a, b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True))
    if isinstance(left, set | frozenset):
        return len(left) == len(right) and all(any(same(a, b) for b in right) for a in left)
    if isinstance(left, dt.datetime | dt.time):
        return bool(left == right) and left.fold == right.fold and repr(left) == repr(right)
    return bool(left == right)


def _zones() -> st.SearchStrategy[dt.timezone]:
    return st.builds(
        dt.timezone, st.timedeltas(min_value=dt.timedelta(hours=-23, minutes=-59), max_value=dt.timedelta(hours=23, minutes=59))
    )


def scalars() -> st.SearchStrategy[Any]:
    """Plain values without parts."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=-(1 << 300), max_value=1 << 300),
        st.floats(allow_nan=False),
        st.text(st.characters(codec=None, exclude_categories=()), max_size=30),
        st.binary(max_size=30),
        st.dates(),
        st.datetimes(timezones=st.none() | _zones()),
        st.times(timezones=st.none() | _zones()),
        st.timedeltas(),
    )


def plain_values(max_leaves: int = 20) -> st.SearchStrategy[Any]:
    """Plain values of every type, nested. Keys hold no NaN: it is not equal to itself, so a lookup would not find it."""
    hashable = st.recursive(scalars(), lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
    return st.recursive(
        scalars() | st.just(math.nan),
        lambda inner: st.one_of(
            st.lists(inner, max_size=5),
            st.tuples(inner, inner),
            st.dictionaries(hashable, inner, max_size=4),
            st.sets(hashable, max_size=4),
            st.frozensets(hashable, max_size=4),
        ),
        max_leaves=max_leaves,
    )
