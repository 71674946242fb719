"""`HostPool`: parallel, never in the way of the caller, and quiet after its end."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlm_sandbox import Limits, open_repl
from rlm_sandbox.bridge import host_pool
from rlm_sandbox.bridge.handles import CallFailed, CallReturned, HostCall, Outcome
from rlm_sandbox.bridge.host_pool import HostPool
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable

PATIENCE = 40.0


@pytest.fixture
def pool() -> Iterator[HostPool]:
    made = HostPool(max_threads=4)
    yield made
    made.close()


def call(function: Any, *args: Any, is_async: bool = False) -> HostCall:
    return HostCall("f", function, args, {}, False, is_async, ())


def submit(pool: HostPool, function: Any, *args: Any, is_async: bool = False) -> queue.Queue[Outcome]:
    outcomes: queue.Queue[Outcome] = queue.Queue()
    pool.submit(call(function, *args, is_async=is_async), outcomes.put)
    return outcomes


def test_a_call_runs_on_another_thread(pool: HostPool) -> None:
    outcome = submit(pool, threading.get_ident).get(timeout=PATIENCE)
    assert isinstance(outcome, CallReturned)
    assert outcome.value != threading.get_ident()


def test_a_failure_is_an_outcome(pool: HostPool) -> None:
    assert submit(pool, lambda: 1 / 0).get(timeout=PATIENCE) == CallFailed("HostCallError", "f failed")


def test_calls_run_in_parallel_up_to_the_bound(pool: HostPool) -> None:
    barrier = threading.Barrier(4)
    outcomes = [submit(pool, barrier.wait, PATIENCE) for _ in range(4)]
    assert sorted(o.get(timeout=PATIENCE).value for o in outcomes) == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_calls_beyond_the_bound_wait_their_turn(pool: HostPool) -> None:
    release, lock = threading.Event(), threading.Lock()
    running = most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(PATIENCE)
        with lock:
            running -= 1

    outcomes = [submit(pool, work) for _ in range(12)]
    time.sleep(0.05)
    release.set()
    for outcome in outcomes:
        assert outcome.get(timeout=PATIENCE) == CallReturned(None)
    assert most <= 4


def test_many_small_calls_all_end_once(pool: HostPool) -> None:
    done: queue.Queue[Outcome] = queue.Queue()
    for n in range(500):
        pool.submit(call(lambda n=n: n), done.put)
    values = sorted(done.get(timeout=PATIENCE).value for _ in range(500))  # type: ignore[union-attr]
    assert values == list(range(500))
    assert done.empty()


def test_a_function_that_never_returns_holds_up_nobody(pool: HostPool) -> None:
    release = threading.Event()
    stuck = submit(pool, release.wait)
    assert submit(pool, lambda: "next").get(timeout=PATIENCE) == CallReturned("next")
    pool.close()
    assert stuck.empty()
    release.set()


def test_pool_threads_do_not_hold_up_the_end_of_the_program(pool: HostPool) -> None:
    outcome = submit(pool, lambda: threading.current_thread().daemon).get(timeout=PATIENCE)
    assert outcome == CallReturned(True)


def test_idle_threads_end(pool: HostPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pool, "IDLE_SECONDS", 0.05)
    outcome = submit(pool, threading.current_thread).get(timeout=PATIENCE)
    assert isinstance(outcome, CallReturned)
    outcome.value.join(PATIENCE)
    assert not outcome.value.is_alive()
    assert submit(pool, lambda: 1).get(timeout=PATIENCE) == CallReturned(1)


def test_context_variables_come_along(pool: HostPool) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("mine")

    async def read() -> str:
        return variable.get()

    assert submit(pool, variable.get).get(timeout=PATIENCE) == CallReturned("mine")
    assert submit(pool, read, is_async=True).get(timeout=PATIENCE) == CallReturned("mine")


def test_async_functions_share_a_loop_and_run_in_parallel(pool: HostPool) -> None:
    arrived: list[int] = []
    both = asyncio.Event()

    async def work(n: int) -> int:
        arrived.append(n)
        if len(arrived) == 2:
            both.set()
        await asyncio.wait_for(both.wait(), PATIENCE)
        return n

    outcomes = [submit(pool, work, n, is_async=True) for n in (1, 2)]
    assert [o.get(timeout=PATIENCE) for o in outcomes] == [CallReturned(1), CallReturned(2)]


def test_an_async_failure_is_an_outcome(pool: HostPool) -> None:
    async def work() -> None:
        raise ValueError("secret")

    assert submit(pool, work, is_async=True).get(timeout=PATIENCE) == CallFailed("HostCallError", "f failed")


def test_nothing_is_started_after_close(pool: HostPool) -> None:
    async def work() -> None:
        raise AssertionError("started after close")

    pool.close()
    pool.close()
    outcomes = [submit(pool, lambda: 1), submit(pool, work, is_async=True)]
    time.sleep(0.05)
    assert all(outcome.empty() for outcome in outcomes)


def test_close_cancels_async_functions_and_lets_them_clean_up(pool: HostPool) -> None:
    started, cleaned = threading.Event(), threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(3_600)
        finally:
            await asyncio.sleep(0.01)
            cleaned.set()

    submit(pool, work, is_async=True)
    assert started.wait(PATIENCE)
    pool.close()
    assert cleaned.wait(PATIENCE)


def test_queued_calls_are_dropped_by_close() -> None:
    pool = HostPool(max_threads=1)
    release, started = threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        release.wait(PATIENCE)

    submit(pool, first)
    assert started.wait(PATIENCE)
    waiting = submit(pool, lambda: "must not run")
    pool.close()
    release.set()
    time.sleep(0.05)
    assert waiting.empty()


def test_async_calls_end_with_their_cell_and_later_ones_do_not(pool: HostPool) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def waits() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def quick() -> int:
        await asyncio.sleep(0.01)
        return 5

    submit(pool, waits, is_async=True)
    assert begun.wait(PATIENCE)
    pool.drop_queued()
    later = submit(pool, quick, is_async=True)
    assert ended.wait(PATIENCE), "it goes on although its cell has ended"
    assert later.get(timeout=PATIENCE) == CallReturned(5)


@pytest.mark.parametrize("name", ["jail", "wasm"])
def test_an_async_host_function_is_cancelled_with_its_cell(name: str) -> None:
    require_usable(name, load_backend(name).probe())
    begun, ended = threading.Event(), threading.Event()

    async def model(_: str) -> str:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return ""

    async def quick() -> int:
        await asyncio.sleep(0.01)
        return 42

    with open_repl(name, limits=Limits(wall_seconds=2)) as repl:
        repl.bind("model", model)
        repl.bind("quick", quick)
        assert repl.exec("await model('?')").outcome == "limit"
        assert begun.wait(PATIENCE)
        assert ended.wait(PATIENCE), "the model is still paid for"
        assert repl.exec("await quick()").value == "42"
