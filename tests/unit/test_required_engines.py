"""A test that needs an engine skips on a laptop and fails where ``RLM_SANDBOX_REQUIRE`` names it; none decides that by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlm_sandbox.registry import Availability

from ..conftest import REQUIRE, require_usable

TESTS = Path(__file__).parents[1]
MISSING = Availability(False, "no namespaces", "ask for them")


@pytest.mark.parametrize("named", ["jail", "monty,jail", " jail ,docker", "all"])
def test_what_is_required_fails(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE, named)
    with pytest.raises(pytest.fail.Exception, match="no namespaces"):
        require_usable("jail", MISSING)
    require_usable("jail", Availability(True))


@pytest.mark.parametrize("named", ["", "docker", "jailer"])
def test_what_is_not_required_is_skipped_with_the_reason(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE, named)
    with pytest.raises(pytest.skip.Exception, match="no namespaces; ask for them"):
        require_usable("jail", MISSING)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.name)
def test_no_test_skips_by_itself_where_a_backend_is_missing(path: Path) -> None:
    text = path.read_text("utf-8")
    found = re.findall(r"\n( *if [^\n]*usable[^\n]*:\n *pytest\.skip\([^\n]*)", text)
    assert not found, f"use require_usable(), which fails where {REQUIRE} names the backend"
