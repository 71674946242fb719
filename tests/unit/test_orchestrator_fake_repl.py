"""`FakeREPL`, which the tests of the loop stand on, keeps the contract where they rely on it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rlm_sandbox import Context, Limits, Opaque, OutputChunk, REPLProtocol, SessionBusy, SessionClosed, expose
from rlm_sandbox.testing import FakeREPL


@pytest.fixture
def repl() -> FakeREPL:
    return FakeREPL(setup="def twice(x): return 2 * x")


def test_is_a_repl_that_promises_nothing(repl: FakeREPL) -> None:
    assert isinstance(repl, REPLProtocol)
    assert "none" in repl.capabilities.isolation
    assert not repl.capabilities.grade("time_seconds")


def test_cells(repl: FakeREPL) -> None:
    assert repl.exec("x = twice(2)\nprint('hi')\nx", read=("x", "gone")).read == {"x": 4}
    result = repl.exec("x += 1\nprint(x)\nmissing")
    assert (result.outcome, result.stdout, result.error) == ("error", "5\n", "NameError: name 'missing' is not defined")
    assert result.traceback is not None
    assert '"<cell 2>", line 3' in result.traceback
    assert "testing.py" not in result.traceback
    assert repl.exec("raise SystemExit(3)").error == "SystemExit: 3"
    assert repl.exec("if").error is not None
    assert repl.names() == {"x": "int: 5"}


def test_values(repl: FakeREPL) -> None:
    repl.set("x", {"a": [1]})
    repl.exec("y = [object(), 1]")
    assert repl.get("x") == {"a": [1]}
    assert repl.get("nope", 7) == 7
    assert isinstance(repl.get("y")[0], Opaque)
    with pytest.raises(TypeError, match="bind"):
        repl.set("f", print)


def test_bindings_survive_a_reset(repl: FakeREPL) -> None:
    def fails() -> None:
        raise KeyError("secret")

    repl.bind("ctx", Context.from_text("abc"))
    repl.bind("P", Context.from_text("abc").whole)
    repl.bind("fails", fails)
    repl.bind("tells", fails, errors=(KeyError,))
    repl.bind("obj", expose([3, 4], methods=("index",)))
    repl.exec("x = 1")
    repl.reset()
    assert repl.names() == {}
    assert repl.exec("P + ctx.slice(0, 1), obj.index(4)").value == "('abca', 1)"
    assert repl.exec("fails()").error == "HostCallError: fails failed"
    assert repl.exec("tells()").error == "KeyError: 'secret'"


def test_ends_a_cell_at_a_host_call(repl: FakeREPL) -> None:
    repl.bind("nap", lambda: time.sleep(0.01))
    loop = "while True:\n    try: nap()\n    except Exception: pass"
    result = repl.exec(loop, limits=Limits(wall_seconds=0.03))
    assert result.outcome == "limit"
    assert result.limit is not None
    assert (result.limit.kind, result.limit.limit) == ("wall_seconds", 0.03)
    result = repl.exec(loop, limits=Limits(host_calls=2))
    assert result.limit is not None
    assert result.limit.kind == "host_calls"
    repl.bind("stop", repl.interrupt)
    assert repl.exec("stop()").outcome == "interrupted"


def test_output_as_it_appears(repl: FakeREPL) -> None:
    seen: list[OutputChunk] = []
    repl.exec("import sys\nprint('a')\nprint('b', file=sys.stderr)", on_output=seen.append)
    assert "".join(chunk.text for chunk in seen if chunk.stream == "stdout") == "a\n"
    assert "".join(chunk.text for chunk in seen if chunk.stream == "stderr") == "b\n"


def test_one_call_at_a_time_and_none_after_the_end(repl: FakeREPL) -> None:
    caught: list[Any] = []

    def again() -> None:
        try:
            repl.names()
        except SessionBusy as exc:
            caught.append(exc)

    repl.bind("again", again)
    assert repl.exec("again()").ok
    assert len(caught) == 1
    with repl:
        pass
    with pytest.raises(SessionClosed):
        repl.exec("1")
