"""`Limits`: finite by default, checked on construction, and narrowed but never widened."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from rlm_sandbox import Limits
from rlm_sandbox.limits import PER_CELL, PER_SESSION

NUMBERS = [name for name in (*PER_CELL, *PER_SESSION) if name != "network"]


def limits(**fields: Any) -> Limits:
    return Limits(**fields)


def test_the_defaults_are_those_of_the_contract() -> None:
    assert dataclasses.asdict(Limits()) == {
        "time_seconds": 10.0,
        "wall_seconds": 600.0,
        "output_bytes": 64 * 1024,
        "host_calls": 10_000,
        "value_bytes": 64 * 1024 * 1024,
        "memory_mb": 512,
        "processes": 64,
        "disk_mb": 64,
        "session_seconds": 3_600.0,
        "network": "none",
    }


def test_every_field_is_per_cell_or_per_session() -> None:
    assert sorted((*PER_CELL, *PER_SESSION)) == sorted(field.name for field in dataclasses.fields(Limits))


def test_limits_are_frozen_and_take_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().time_seconds = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Limits(5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        limits(time_second=5)


@pytest.mark.parametrize("name", NUMBERS)
def test_unlimited_is_spelled_none(name: str) -> None:
    assert getattr(limits(**{name: None}), name) is None


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "10", [1], 1j])
def test_a_wrong_type_is_a_type_error_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        limits(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 10**12])
def test_out_of_range_is_a_value_error_that_names_the_field(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        limits(**{name: value})


@pytest.mark.parametrize("name", ["time_seconds", "wall_seconds", "session_seconds"])
@pytest.mark.parametrize("value", [0, math.nan, math.inf, -0.5])
def test_seconds_are_finite_and_above_zero(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        limits(**{name: value})


@pytest.mark.parametrize("name", ["output_bytes", "host_calls", "value_bytes", "memory_mb", "processes", "disk_mb"])
def test_counts_are_whole_numbers(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        limits(**{name: 100.5})


def test_network_is_none_and_nothing_else() -> None:
    with pytest.raises(ValueError, match="network"):
        Limits(network="all")
    with pytest.raises(TypeError, match="network"):
        limits(network=None)


# ---- narrowed


def test_nothing_asked_changes_nothing() -> None:
    session = Limits(time_seconds=5)
    assert session.narrowed(None) is session
    assert session.narrowed(Limits(time_seconds=5)) == session


@pytest.mark.parametrize(
    ("name", "value"), [("time_seconds", 1), ("wall_seconds", 2.5), ("output_bytes", 0), ("host_calls", 3), ("value_bytes", 2_000)]
)
def test_a_cell_may_ask_for_less(name: str, value: Any) -> None:
    narrowed = Limits().narrowed(limits(**{name: value}))
    assert narrowed == limits(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("time_seconds", 11), ("wall_seconds", None), ("output_bytes", 1 << 20), ("host_calls", 10_001), ("value_bytes", None)],
)
def test_a_cell_may_not_ask_for_more(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Limits().narrowed(limits(**{name: value}))


@pytest.mark.parametrize(("name", "value"), [("memory_mb", 100), ("processes", 1), ("disk_mb", None), ("session_seconds", 1)])
def test_a_cell_cannot_change_what_belongs_to_the_session(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Limits().narrowed(limits(**{name: value}))


def test_defaults_are_no_request_to_widen() -> None:
    session = Limits(time_seconds=2, host_calls=10, memory_mb=100)
    assert session.narrowed(Limits(output_bytes=100)) == dataclasses.replace(session, output_bytes=100)


def test_an_unlimited_session_can_be_narrowed() -> None:
    session = Limits(time_seconds=None, host_calls=None)
    narrowed = session.narrowed(Limits(time_seconds=3, host_calls=7))
    assert (narrowed.time_seconds, narrowed.host_calls) == (3, 7)


def test_narrowed_wants_limits() -> None:
    with pytest.raises(TypeError):
        Limits().narrowed({"time_seconds": 1})  # type: ignore[arg-type]
