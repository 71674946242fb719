"""A context reached by host calls: every call's cost is bounded before it is made, and patterns run elsewhere."""

from __future__ import annotations

import re
import threading
import time

import pytest

from rlm_sandbox import Context


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    pytest.importorskip("pydantic_monty")


TEXT = "alpha beta\n<!-- Page 1 -->one needle<!-- Page 2 -->two Needle \U0001f600 täxt"


def test_searches_mean_what_they_mean_on_the_host() -> None:
    from rlm_sandbox.bridge.search import SearchProcess

    context = Context.from_documents([TEXT, "more needles"])
    search = SearchProcess(context)
    try:
        for options in ({"regex": True}, {"case_sensitive": False}, {"regex": True, "max_matches": 1, "start": 20}):
            assert search.call("find", ("n.*?e",), options) == context.find("n.*?e", **options)
        assert search.call("page", (2,), {}) == context.page(2)
        with pytest.raises(re.error):
            search.call("find", ("(",), {"regex": True})
        with pytest.raises(TypeError):
            search.call("find", (3,), {"regex": True})
    finally:
        search.close()


def test_a_search_can_be_cancelled_and_the_next_one_works() -> None:
    from rlm_sandbox.bridge.search import SearchProcess

    search = SearchProcess(Context.from_text("a" * 5_000 + "b"))
    try:
        assert search.call("find", ("b",), {"regex": True}) == [(5_000, 5_001, "b")]
        timer = threading.Timer(0.2, search.cancel)
        timer.start()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="simpler"):
            search.call("find", ("(a|aa)+$",), {"regex": True})
        assert time.monotonic() - start < 60  # the search itself would take years
        timer.join(60)
        assert search.call("find", ("b",), {"regex": True}) == [(5_000, 5_001, "b")]
    finally:
        search.close()


def test_what_would_be_large_is_refused_before_it_is_made() -> None:
    from rlm_sandbox.bridge.context_calls import BoundContext

    bound = BoundContext(Context.from_text("a" * 2_000_000), 10_000_000)
    too_large = "the result would have more than"
    with pytest.raises(ValueError, match=too_large):
        bound.chunk(2, 1)
    with pytest.raises(ValueError, match=too_large):
        bound.chunk(1_000_000, 999_000)
    with pytest.raises(ValueError, match=too_large):
        bound.find("a", max_matches=10**9)
    with pytest.raises(TypeError):
        bound.chunk("2")  # type: ignore[arg-type]
    assert bound.find("a", max_matches=2) == [(0, 1, "a"), (1, 2, "a")]
    assert len(bound.chunk(1_000_000, 10)) == 3
