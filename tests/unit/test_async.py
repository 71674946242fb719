"""`AsyncREPL` over a jail and over the fake: cancelled calls, two hundred sessions in one loop, functions of the loop."""

from __future__ import annotations

import asyncio
import gc
import resource
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import psutil
import pytest

from rlm_sandbox import AsyncREPL, Limits, OutputChunk, PoolTimeout, SessionBusy, SessionClosed, SessionPool
from rlm_sandbox.registry import load_backend
from rlm_sandbox.testing import FakeREPL

from ..conftest import require_usable
from ..escape.outside import wait_until
from ..spares import living

SMALL = Limits(memory_mb=64, disk_mb=4, time_seconds=60)
#: What a cancelled call promises (grace and recovery), and a loaded machine's share; far less than the cells would take.
ENDS_SECONDS = 40.0


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    require_usable("jail", load_backend("jail").probe())


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


STUBBORN = "x = 2\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass"
CELLS = {
    "a loop": "x = 2\nwhile True: pass",
    "a sleep": "import time\nx = 2\ntime.sleep(60)",
    "one that ignores the interrupt": STUBBORN,
    "one call into C": "import itertools\nx = 2\nmax(itertools.count())",
    "a host function that waits": "x = 2\nwait()",
    "threads": "import threading\nx = 2\nfor _ in range(3): threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()\nwhile True: pass",
}


@pytest.mark.parametrize("code", CELLS.values(), ids=CELLS)
def test_a_cancelled_cell_ends_and_the_session_is_usable(code: str) -> None:
    release = threading.Event()

    async def main() -> None:
        async with await AsyncREPL.open("jail", limits=SMALL) as repl:
            await repl.bind("wait", release.wait)
            await repl.bind("begun", begun := _Begun())
            assert (await repl.exec("x = [1]")).ok
            task = asyncio.create_task(repl.exec("begun()\n" + code))
            await begun.wait()
            start = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - start < ENDS_SECONDS
            following = await repl.exec("x if x == 2 else x[0]")
            assert following.ok, following.error
            assert following.value in ("2", "1")

    try:
        run(main)
    finally:
        release.set()


class _Begun:
    """A host function that tells the loop it was called."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def __call__(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await asyncio.wait_for(self._event.wait(), 30)


def test_a_call_cancelled_before_it_began_costs_nothing() -> None:
    async def main() -> None:
        async with await AsyncREPL.open("jail", limits=SMALL) as repl:
            for _ in range(20):
                task = asyncio.create_task(repl.exec("while True: pass"))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert (await repl.exec("1 + 1")).value == "2"

    run(main)


def test_a_timeout_of_the_loop_is_a_cancellation() -> None:
    async def main() -> None:
        async with await AsyncREPL.open("jail", limits=SMALL) as repl:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await repl.exec("while True: pass")
            assert (await repl.exec("1 + 1")).value == "2"

    run(main)


def test_two_hundred_sessions_in_one_event_loop() -> None:
    async def one(number: int, everybody: asyncio.Barrier) -> int:
        async with await AsyncREPL.open("jail", limits=Limits(memory_mb=64, disk_mb=4), recovery=False) as repl:

            async def host(value: int) -> int:
                await asyncio.sleep(0.05)
                return value + number

            await repl.bind("host", host)
            await everybody.wait()
            result = await repl.exec("x = await host(1000)", read=("x",))
            assert result.ok, result.error
            found: int = result.read["x"]
            return found

    async def main() -> None:
        everybody = asyncio.Barrier(200)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        values = await asyncio.gather(*(one(number, everybody) for number in range(200)))
        ticking.cancel()
        assert values == [1000 + number for number in range(200)]
        assert ticks > 10, "the event loop stood still"

    threads = threading.active_count()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 65_536, hard))  # nine for each session
    try:
        run(main)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: threading.active_count() <= threads, "threads are left", 10)


def test_an_async_host_function_runs_in_the_loop_that_bound_it() -> None:
    async def main() -> None:
        loop, held = asyncio.get_running_loop(), asyncio.Event()
        seen: list[object] = []

        async def here(value: int) -> int:
            seen.append(asyncio.get_running_loop())
            held.set()  # an object of this loop
            return value * 2

        async with await AsyncREPL.open("jail", limits=SMALL) as repl:
            await repl.bind("here", here)
            result = await repl.exec("import asyncio\nawait asyncio.gather(here(1), here(2))")
            assert result.value == "[2, 4]", result.error
        assert seen == [loop, loop]
        assert held.is_set()

    run(main)


def test_output_comes_in_the_loop_before_the_result() -> None:
    async def main() -> None:
        chunks: list[tuple[OutputChunk, int]] = []
        async with await AsyncREPL.open("jail", limits=SMALL) as repl:
            await repl.exec("print('one')\nprint('two')", on_output=lambda chunk: chunks.append((chunk, threading.get_ident())))
        assert "".join(chunk.text for chunk, _ in chunks) == "one\ntwo\n"
        assert {thread for _, thread in chunks} == {threading.get_ident()}

    run(main)


def test_one_call_at_a_time_but_interrupt_and_close() -> None:
    async def main() -> None:
        repl = await AsyncREPL.open("jail", limits=SMALL)
        begun = _Begun()
        await repl.bind("begun", begun)
        task = asyncio.create_task(repl.exec("begun()\nwhile True: pass"))
        await begun.wait()
        with pytest.raises(SessionBusy):
            await repl.get("x")
        repl.interrupt()
        assert (await task).outcome == "interrupted"
        begun._event.clear()
        task = asyncio.create_task(repl.exec("begun()\nwhile True: pass"))
        await begun.wait()
        await repl.close()
        await repl.close()
        await task
        with pytest.raises(SessionClosed):
            await repl.exec("1")

    run(main)


def test_a_pools_sessions_are_shared_by_tasks() -> None:
    async def main() -> None:
        with SessionPool("jail", 2, SMALL, recovery=False) as pool:

            async def one(number: int) -> str | None:
                async with await AsyncREPL.from_pool(pool) as repl:
                    return (await repl.exec(f"{number} * 2")).value

            assert await asyncio.gather(*map(one, range(8))) == [str(number * 2) for number in range(8)]
            async with await AsyncREPL.from_pool(pool), await AsyncREPL.from_pool(pool):
                with pytest.raises(PoolTimeout):
                    await AsyncREPL.from_pool(pool, timeout_seconds=0.05)

    run(main)


def test_copies_and_checkpoints_are_awaited_too() -> None:
    async def main() -> None:
        async with await AsyncREPL.open("jail", limits=SMALL) as repl:
            await repl.exec("x = [1]")
            async with await repl.fork() as copy:
                await asyncio.gather(copy.exec("x.append(2)"), repl.exec("x.append(3)"))
                assert (await copy.get("x"), await repl.get("x")) == ([1, 2], [1, 3])
            point = await repl.checkpoint()
            await repl.exec("x = None\nopen('/tmp/out', 'w').write('text')")
            await repl.restore(point)
            assert await repl.get("x") == [1, 3]
            assert await repl.read_file("out") == b"text"

    run(main)


def test_an_opening_that_is_cancelled_leaves_nothing() -> None:
    async def main() -> None:
        async with await AsyncREPL.open("jail", limits=SMALL):
            before = len(living(psutil.Process()))
            for _ in range(5):
                task = asyncio.create_task(AsyncREPL.open("jail", limits=SMALL))
                await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.to_thread(wait_until, lambda: len(living(psutil.Process())) <= before, "left behind", 10)

    run(main)


def test_any_session_will_do_and_what_it_lacks_is_said() -> None:
    async def main() -> None:
        async with AsyncREPL(FakeREPL()) as repl:
            await repl.set("x", 5)
            assert await repl.get("x") == 5
            assert (await repl.exec("x + 1")).value == "6"
            assert "x" in await repl.names()
            await repl.reset()
            assert await repl.get("x", "gone") == "gone"
            for lacking in (repl.fork(), repl.checkpoint(), repl.restore("a"), repl.read_file("a")):
                with pytest.raises(NotImplementedError, match="choose another backend"):
                    await lacking

    run(main)


def test_a_session_that_is_dropped_ends_its_thread() -> None:
    def lanes() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "rlm-sandbox-async"}

    async def main() -> set[threading.Thread]:
        before = lanes()
        repl = AsyncREPL(FakeREPL())
        assert (await repl.exec("1")).ok
        return lanes() - before

    own = asyncio.run(main())
    assert len(own) == 1
    gc.collect()
    wait_until(lambda: not own & lanes(), "its thread goes on", 10)
