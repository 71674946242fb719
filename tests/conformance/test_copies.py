"""`fork`, `checkpoint` and `restore`, on the backends that have them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlm_sandbox import Context, REPLProtocol, SessionBusy, SupportsCheckpoint, SupportsFork

from ..conftest import OpenSession
from .support import MISSING, ok, only_if

pytestmark = only_if(lambda capabilities: capabilities.fork, "no fork is declared")


@pytest.fixture
def original(open_session: OpenSession) -> REPLProtocol:
    repl = open_session(setup="base = 40")
    repl.bind("twice", lambda value: value * 2)
    ok(repl.exec("x = [1]"))
    return repl


@pytest.fixture
def copy(original: REPLProtocol) -> Iterator[REPLProtocol]:
    assert isinstance(original, SupportsFork)
    with original.fork() as copied:
        yield copied


def test_a_copy_has_the_state_and_goes_its_own_way(original: REPLProtocol, copy: REPLProtocol) -> None:
    assert ok(copy.exec("x.append(base + twice(1))", read=("x",))).read == {"x": [1, 42]}
    assert ok(original.exec("x.append(3)", read=("x",))).read == {"x": [1, 3]}
    copy.set("only_here", 1)
    assert original.get("only_here", "nothing") == "nothing"
    copy.bind("twice", lambda value: value * 3)
    assert ok(copy.exec("y = twice(2)", read=("y",))).read == {"y": 6}
    assert ok(original.exec("y = twice(2)", read=("y",))).read == {"y": 4}
    assert {"x", "y"} <= copy.names().keys()


def test_each_prints_for_itself(original: REPLProtocol, copy: REPLProtocol) -> None:
    assert ok(copy.exec("print('copy')")).stdout == "copy\n"
    assert ok(original.exec("print('original')")).stdout == "original\n"


def test_the_end_of_one_is_not_the_end_of_the_other(original: REPLProtocol, copy: REPLProtocol) -> None:
    original.close()
    assert ok(copy.exec("x.append(twice(1))", read=("x",))).read == {"x": [1, 2]}
    assert isinstance(copy, SupportsFork)
    with copy.fork() as second:
        copy.close()
        assert ok(second.exec("x.append(3)", read=("x",))).read == {"x": [1, 2, 3]}


def test_a_copy_of_a_copy_and_a_reset_of_one(original: REPLProtocol, copy: REPLProtocol) -> None:
    assert isinstance(copy, SupportsFork)
    with copy.fork() as second:
        copy.reset()
        assert copy.get("x", "nothing") == "nothing"
        assert ok(copy.exec("y = base + twice(1)", read=("y",))).read == {"y": 42}
        assert [second.get("x"), original.get("x")] == [[1], [1]]


def test_a_session_cannot_be_copied_by_its_own_host_function(original: REPLProtocol) -> None:
    assert isinstance(original, SupportsFork)
    errors: list[Exception] = []

    def copy_it() -> None:
        try:
            original.fork()
        except SessionBusy as exc:
            errors.append(exc)

    original.bind("copy_it", copy_it)
    ok(original.exec("copy_it()"))
    assert len(errors) == 1


def test_going_back_several_cells_and_again(original: REPLProtocol) -> None:
    assert isinstance(original, SupportsCheckpoint)
    first = original.checkpoint()
    ok(original.exec("x.append(2)"))
    second = original.checkpoint()
    ok(original.exec("x = 'spoilt'\nz = 1"))
    ok(original.exec("y = 2"))
    original.restore(first)
    assert original.get("x") == [1]
    assert original.get("z", MISSING) is MISSING
    ok(original.exec("x.append('again')"))
    original.restore(second)
    assert original.get("x") == [1, 2]
    original.restore(first)
    assert ok(original.exec("x.append(twice(4))", read=("x",))).read == {"x": [1, 8]}


def test_going_back_takes_bindings_back(original: REPLProtocol) -> None:
    assert isinstance(original, SupportsCheckpoint)
    point = original.checkpoint()
    original.bind("twice", lambda value: 0)
    original.bind("ctx", Context.from_text("some text"))
    assert ok(original.exec("y = twice(5), ctx.find('text') != []", read=("y",))).read["y"][0] == 0
    original.restore(point)
    assert ok(original.exec("y = twice(5)", read=("y",))).read == {"y": 10}
    assert original.get("ctx", MISSING) is MISSING


def test_a_checkpoint_of_nobody_is_refused(original: REPLProtocol) -> None:
    assert isinstance(original, SupportsCheckpoint)
    for wrong in ("", "no such", original.checkpoint() + "0"):
        with pytest.raises(ValueError, match="no such checkpoint"):
            original.restore(wrong)
    assert original.get("x") == [1]
