"""`expose`: an allow-list of public names, checked when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from rlm_sandbox import Exposed, expose
from rlm_sandbox.binding import OPERATORS


class Thing:
    size = 3

    def find(self, what: str) -> str:
        return what

    def _hidden(self) -> str:
        return "hidden"


def test_expose_keeps_the_allow_list() -> None:
    thing = Thing()
    exposed = expose(thing, methods=("find",), attributes=["size"], operators={"len"})
    assert exposed == Exposed(thing, frozenset({"find"}), frozenset({"size"}), frozenset({"len"}), "Thing")


def test_nothing_is_exposed_by_default() -> None:
    exposed = expose(Thing())
    assert (exposed.methods, exposed.attributes, exposed.operators) == (frozenset(), frozenset(), frozenset())


@pytest.mark.parametrize("name", ["_hidden", "__class__", "__init__", "_"])
@pytest.mark.parametrize("kind", ["methods", "attributes"])
def test_private_names_are_refused(kind: str, name: str) -> None:
    names: dict[str, Any] = {kind: (name,)}
    with pytest.raises(ValueError, match="private"):
        expose(Thing(), **names)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "1a", "class", "find\n", 3, None, "\ud800"])
@pytest.mark.parametrize("kind", ["methods", "attributes"])
def test_what_is_no_identifier_is_refused(kind: str, name: Any) -> None:
    names: dict[str, Any] = {kind: (name,)}
    with pytest.raises(ValueError, match="identifier"):
        expose(Thing(), **names)


@pytest.mark.parametrize("kind", ["methods", "attributes"])
def test_one_string_is_not_a_tuple_of_names(kind: str) -> None:
    names: dict[str, Any] = {kind: "find"}
    with pytest.raises(TypeError, match="tuple of names"):
        expose(Thing(), **names)


def test_methods_must_exist_and_be_callable() -> None:
    for name in ("missing", "size"):
        with pytest.raises(TypeError, match=name):
            expose(Thing(), methods=(name,))


def test_a_name_is_a_method_or_an_attribute() -> None:
    with pytest.raises(ValueError, match="choose one"):
        expose(Thing(), methods=("find",), attributes=("find",))


@pytest.mark.parametrize("name", ["setitem", "call", "__len__", "add", ""])
def test_unknown_operators_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown operator"):
        expose(Thing(), operators=(name,))


def test_operators_only_read() -> None:
    assert set(OPERATORS) == {"bool", "contains", "eq", "getitem", "iter", "len", "str"}
