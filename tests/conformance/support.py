"""Words the conformance tests share. What they assert, they assert through the public contract only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from rlm_sandbox import Capabilities, ExecResult, Grade, REPLProtocol

#: ``@needs(Feature.X)``: must pass where X is declared and fail where it is not.
needs = pytest.mark.needs

#: Nothing in these tests is a benchmark: this is how long a loaded machine may take over what should be immediate.
PATIENCE_SECONDS: Final = 20.0
#: A value no guest can produce.
MISSING: Final = object()


def only_if(predicate: Callable[[Capabilities], bool], reason: str) -> pytest.MarkDecorator:
    """Skip where a test would be pointless or dangerous: a memory bomb without a memory limit, say."""
    return pytest.mark.only_if(predicate, reason)


def enforces(*limits: str) -> pytest.MarkDecorator:
    """Skip on backends that grade one of these limits `Grade.NONE`."""
    return only_if(
        lambda capabilities: all(capabilities.grade(limit) > Grade.NONE for limit in limits),
        f"does not enforce {', '.join(limits)}",
    )


def ok(result: ExecResult) -> ExecResult:
    """The result of a cell that must have run to its end."""
    assert result.outcome == "ok", f"{result.outcome}: {result.error}\n{result.traceback}\n{result.stderr}"
    assert result.error is None
    assert result.limit is None
    assert result.state == "kept"
    return result


def run(repl: REPLProtocol, code: str, name: str) -> Any:
    """Run a cell that must succeed and bring ``name`` back."""
    ok(repl.exec(code))
    found = repl.get(name, MISSING)
    assert found is not MISSING, f"the cell did not leave {name!r} behind"
    return found


def error_type(result: ExecResult) -> str:
    """The exception type's name of a cell that must have raised."""
    assert result.outcome == "error", f"{result.outcome}, {result.limit}"
    assert result.error is not None
    return result.error.partition(":")[0]


def assert_alive(repl: REPLProtocol, result: ExecResult, **expected: Any) -> None:
    """After ``result`` the session works and holds ``expected``; only a backend without recovery may have lost them."""
    if result.state == "lost":
        assert repl.capabilities.recovery == "none", "a backend with recovery lost the session's variables"
        assert set(expected) <= set(result.lost_names)
        assert all(repl.get(name, MISSING) is MISSING for name in expected)
    else:
        assert result.lost_names == ()
        assert {name: repl.get(name, MISSING) for name in expected} == expected
    assert run(repl, "alive_again = 20 + 1", "alive_again") == 21


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What runs inside takes at most ``seconds`` and a loaded machine's patience."""
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert took < seconds + PATIENCE_SECONDS, f"took {took:.1f} s, expected about {seconds:.1f} s"
