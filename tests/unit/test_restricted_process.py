"""``RestrictedOptions(process=True)``: the same language where the limits bind."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from rlm_sandbox import Context, Feature, Grade, GuestError, Limits, REPLProtocol, UnsupportedLimit
from rlm_sandbox.registry import Availability, load_backend

from ..conformance.support import assert_alive
from ..conftest import declared_by, open_variant, require_usable, variant_state

LIMITS = Limits(time_seconds=1, memory_mb=128)


@pytest.fixture(params=["restricted-process", "restricted-plain"])
def where(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    require_usable("restricted", variant_state(name))
    return name


def _open(where: str, setup: str) -> REPLProtocol:
    if where == "restricted-process":  # no accept, no trusted: every limit is enforced from outside
        return open_variant(where, limits=LIMITS, setup=setup)
    return open_variant(where, limits=LIMITS, setup=setup, accept=Grade.COOPERATIVE, trusted=True)


@pytest.fixture
def repl(where: str) -> Iterator[REPLProtocol]:
    with _open(where, "base = 10") as session:
        yield session


def test_it_declares_what_its_guest_enforces(where: str) -> None:
    declared = declared_by(where)
    assert {declared.time_seconds, declared.memory_mb, declared.crash, declared.interrupt} == {Grade.HARD}
    assert not declared.has(Feature.CPYTHON)
    assert "none against an adversary" in declared.isolation


def test_without_a_jail_it_is_a_plain_child(monkeypatch: pytest.MonkeyPatch) -> None:
    require_usable("restricted", variant_state("restricted-plain"))
    monkeypatch.setattr(
        type(load_backend("jail")), "probe", lambda self, options=None: Availability(False, "no namespaces", "none")
    )
    assert declared_by("restricted-process") == declared_by("restricted-plain")
    with pytest.raises(UnsupportedLimit):
        open_variant("restricted-process")
    with open_variant("restricted-process", limits=LIMITS, accept=Grade.COOPERATIVE, trusted=True) as repl:
        assert repl.exec("kept = 1.5 in range(10 ** 12)").outcome == "limit"
        assert repl.exec("1 + 1").value == "2"


def test_the_language_is_the_same(repl: REPLProtocol) -> None:
    assert repl.capabilities.backend == "restricted"
    assert repl.exec("print('said')\nbase + 1").value == "11"
    for code in (
        "import os",
        "open('x')",
        "().__class__",
        "async def f(): pass",
        "'{0.__class__}'.format(1)",
        "import json\njson.codecs",
    ):
        result = repl.exec(code)
        assert result.outcome == "error", code
    traceback = repl.exec("def f():\n    return 1 / 0\nf()").traceback
    assert re.findall(r'File "(.*)", line (\d+)', traceback or "") == [("<cell 8>", "3"), ("<cell 8>", "2")]
    assert "return 1 / 0" in (traceback or "")


def test_bindings_values_and_reset(repl: REPLProtocol) -> None:
    repl.bind("ctx", Context.from_text("a needle"))
    repl.bind("double", lambda n: n * 2)
    repl.set("n", 4)
    assert repl.exec("r = [double(n), ctx.find('needle'), base]").ok
    assert repl.get("r") == [8, [(2, 8, "needle")], 10]
    assert "r" in repl.names()
    repl.reset()
    assert repl.names() == {}
    assert repl.exec("[double(1), base]").value == "[2, 10]"
    assert repl.exec("import os").outcome == "error"


@pytest.mark.parametrize(
    "code",
    [
        "1.5 in range(10 ** 12)",
        "x = ['y' * 1_000_000 + str(i) for i in range(1_000)]",
        "x = 'a'.ljust(10 ** 10)",
        "a = ()\nfor _ in range(400_000):\n    a = (a,)\nd = {a: 1}",
        "while True:\n    try:\n        pass\n    except BaseException:\n        pass",
    ],
)
def test_the_holes_of_the_process_cost_only_their_cell(repl: REPLProtocol, code: str) -> None:
    assert repl.exec("kept = [1]").ok
    result = repl.exec(code)
    assert result.outcome in ("limit", "crashed")
    assert_alive(repl, result, kept=[1])
    assert repl.exec("import os").outcome == "error", "the recovery point is under the policy too"


def test_an_error_in_setup_is_a_guest_error(where: str) -> None:
    with pytest.raises(GuestError, match="os"):
        _open(where, "import os")
