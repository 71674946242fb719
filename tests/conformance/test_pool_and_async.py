"""`SessionPool` and `AsyncREPL` over every backend: what is theirs alone is in ``tests/unit``."""

from __future__ import annotations

import asyncio

import pytest

from rlm_sandbox import AsyncREPL, Limits, PoolTimeout, SessionClosed, SessionPool
from rlm_sandbox.registry import SessionConfig, load_backend

from ..conftest import VARIANTS, OpenSession, lowest_grade
from .support import assert_alive, ok


def test_a_pool_hands_out_sessions_that_are_set_up(backend: str) -> None:
    name, options = VARIANTS[backend]
    accept = lowest_grade(load_backend(name).capabilities(SessionConfig(options=options)), Limits())
    with SessionPool(name, 1, options=options, ready=1, accept=accept, trusted=True, setup="base = 40") as pool:
        for _ in range(2):
            with pool.open_repl() as repl:
                repl.bind("two", lambda: 2)
                assert "x" not in repl.names()
                assert ok(repl.exec("x = base + two()\nx", read=("x",))).read == {"x": 42}
                with pytest.raises(PoolTimeout):
                    pool.open_repl(timeout_seconds=0)
            with pytest.raises(SessionClosed):
                repl.exec("1")


def test_awaited_calls_are_the_sessions_own(open_session: OpenSession) -> None:
    async def main() -> None:
        async with AsyncREPL(open_session()) as repl:
            await repl.set("x", [1, "a"])
            await repl.bind("twice", lambda value: value * 2)
            result = ok(await repl.exec("y = twice(x)\nprint(len(y))", read=("y",)))
            assert (result.stdout, result.read) == ("4\n", {"y": [1, "a", 1, "a"]})
            assert await repl.get("y") == [1, "a", 1, "a"]
            assert await repl.get("z", "nothing") == "nothing"
            assert {"x", "y"} <= (await repl.names()).keys()
            await repl.reset()
            assert await repl.get("x", "gone") == "gone"

    asyncio.run(main())


def test_a_cancelled_cell_leaves_the_session_usable(open_session: OpenSession) -> None:
    repl = open_session()
    ok(repl.exec("before = 1"))

    async def main() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        wrapped = AsyncREPL(repl)
        await wrapped.bind("begin", lambda: loop.call_soon_threadsafe(begun.set) and None)
        running = asyncio.create_task(wrapped.exec("begin()\nn = 0\nwhile True:\n    n += 1"))
        await asyncio.wait_for(begun.wait(), 30)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await wrapped.exec("before + 1")).outcome in ("ok", "error")

    asyncio.run(main())
    assert_alive(repl, repl.exec("pass"))
