"""Messages: the schema is a snapshot, and only well-formed messages that may come now are read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_sandbox.wire import messages
from rlm_sandbox.wire.codec import WireError
from rlm_sandbox.wire.frames import PROTOCOL_VERSION
from rlm_sandbox.wire.messages import SCHEMA, Exec, Forget, Get, Hello, Message, Resume, Suspend, dump_message, load_message

SNAPSHOT = Path(__file__).parent / "wire_schema.json"
ALL = (Message,)


def test_the_schema_is_the_snapshot() -> None:
    """Could an older peer misread this?

    A message or field that was added, removed, renamed, reordered or retyped: if a peer built before the change could take
    the new bytes for something else, or the new side the old bytes, raise PROTOCOL_VERSION. Then write the snapshot anew:
    ``python -m tests.unit.test_wire_messages``. (Until the first release all peers are built from one tree, and version 1
    may still change.)
    """
    assert json.loads(SNAPSHOT.read_text("utf-8")) == {"version": PROTOCOL_VERSION, "messages": SCHEMA}


def test_every_field_type_is_checked_or_a_tree() -> None:
    kinds = {line.partition(": ")[2] for lines in SCHEMA.values() for line in lines}
    assert kinds - set(messages._CHECKS) <= {"Any"}


SAMPLES: dict[str, Any] = {
    "int": 1,
    "str": "x",
    "bool": True,
    "int | None": None,
    "str | None": None,
    "float | None": 1.5,
    "list[str]": ["x"],
    "list[str] | None": ["a", "b", "c"],
    "list[list[Any]]": [[1, 2]],
    "str | bytes": ["a", 0],
    "Any": ["l"],
}


def sample(op: str) -> list[Any]:
    return [op, *(SAMPLES[line.partition(": ")[2]] for line in SCHEMA[op])]


@pytest.mark.parametrize("op", SCHEMA)
def test_messages_round_trip(op: str) -> None:
    header = sample(op)
    message = load_message(header, ALL)
    assert type(message).op == op
    assert dump_message(message) == header


@pytest.mark.parametrize("op", SCHEMA)
def test_a_wrong_field_is_refused(op: str) -> None:
    header = sample(op)
    for index, line in enumerate(SCHEMA[op], start=1):
        kind = line.partition(": ")[2]
        if kind == "Any":
            continue
        wrong: list[Any] = [{}, object(), 1.5 if kind != "float | None" else "1"]
        if kind.startswith("list"):
            wrong += [[1], [["x"], "y"], "text", ["x", None]]
        if kind in ("int", "int | None"):
            wrong += [True, "1", 1.0]
        if kind == "bool":
            wrong += [0, 1, None]
        for value in wrong:
            with pytest.raises(WireError):
                load_message([*header[:index], value, *header[index + 1 :]], ALL)


@pytest.mark.parametrize("op", SCHEMA)
def test_a_missing_or_extra_field_is_refused(op: str) -> None:
    header = sample(op)
    with pytest.raises(WireError):
        load_message([*header, None], ALL)
    if len(header) > 1:
        with pytest.raises(WireError):
            load_message(header[:-1], ALL)


@pytest.mark.parametrize(
    "header", [None, {}, "exec", [], [1], [None], [["exec"]], ["nothing"], ["__class__"], [True], ("get", "x")]
)
def test_what_is_no_message_is_refused(header: Any) -> None:
    with pytest.raises(WireError):
        load_message(header, ALL)


def test_only_what_may_come_now_is_read() -> None:
    header = dump_message(Get("x"))
    assert load_message(header, (Get, Exec)) == Get("x")
    for expected in ((Exec,), (Hello,), (Resume, Forget), (Suspend,)):
        with pytest.raises(WireError):
            load_message(header, expected)


@settings(max_examples=200)
@given(
    op=st.sampled_from([*SCHEMA, "?"]),
    values=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)
        ),
        max_size=8,
    ),
)
def test_any_header_is_a_message_or_a_wire_error(op: str, values: list[Any]) -> None:
    with contextlib.suppress(WireError):
        load_message([op, *values], ALL)


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps({"version": PROTOCOL_VERSION, "messages": SCHEMA}, indent=2) + "\n", "utf-8")
