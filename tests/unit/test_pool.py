"""`SessionPool` over the jail: what is taken, how many there are, who waits for whom, and what is left when it closes."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from rlm_sandbox import Limits, PoolTimeout, REPLProtocol, SessionClosed, SessionPool, SupportsCheckpoint, SupportsFork, open_repl
from rlm_sandbox.protocol import SupportsWaiting
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from ..ctrl_c import unseen_ctrl_c
from ..escape.outside import wait_until
from ..spares import living

SMALL = Limits(memory_mb=64, disk_mb=4)


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    require_usable("jail", load_backend("jail").probe())


@pytest.fixture
def make_pool() -> Iterator[Callable[..., SessionPool]]:
    made: list[SessionPool] = []

    def make(size: int = 2, **more: Any) -> SessionPool:
        more.setdefault("limits", SMALL)
        made.append(SessionPool("jail", size, **more))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def ready(pool: SessionPool) -> int:
    return len(pool._stock._sessions)


def has_news(session: Any) -> bool:
    """Whether its supervisor reported something, or is gone."""
    poll = select.poll()
    poll.register(session._guest.control_fd, select.POLLIN)
    return bool(poll.poll(0))


def test_a_session_is_ready_and_is_replaced_when_it_is_taken(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(4, ready=2, setup="base = 20")
    wait_until(lambda: ready(pool) == 2, "no sessions are ready")
    waiting = {id(session) for session, _ in pool._stock._sessions}
    with pool.open_repl() as repl:
        assert id(repl._session) in waiting, "a new session was opened although one was ready"  # type: ignore[attr-defined]
        assert repl.exec("x = base + 1\nx").value == "21"
        assert repl.names().keys() == {"x"}
        wait_until(lambda: ready(pool) == 2, "the session that was taken was not replaced")


def test_a_session_is_used_once(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(1, ready=1)
    seen = set()
    for _ in range(4):
        with pool.open_repl() as repl:
            seen.add(id(repl))
            result = repl.exec(
                "import os\nfirst = 'mark' not in globals() and os.listdir('/tmp') == []\nmark = open('/tmp/mark', 'w')\nfirst"
            )
            assert result.value == "True"
        with pytest.raises(SessionClosed):
            repl.exec("1")


def test_a_full_pool_says_so_and_what_to_do(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(2)
    first, second = pool.open_repl(), pool.open_repl()
    with pytest.raises(PoolTimeout, match=r"all 2 sessions of the pool were in use for 0\.05 seconds; close a session, wait"):
        pool.open_repl(timeout_seconds=0.05)
    with pytest.raises(PoolTimeout):
        pool.open_repl(timeout_seconds=0)
    for wrong in (-1, -1.0, float("nan"), float("inf")):  # not one of them means the pool's own
        with pytest.raises(ValueError, match="a number of seconds, 0 or more"):
            pool.open_repl(timeout_seconds=wrong)
    first.close()
    first.close()  # gives one place back, not two
    with pool.open_repl(timeout_seconds=5), pytest.raises(PoolTimeout):
        pool.open_repl(timeout_seconds=0)
    second.close()


def test_who_waits_longest_is_next(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(1, ready=0)
    order: list[int] = []
    holder = pool.open_repl()

    def wait(number: int) -> None:
        with pool.open_repl(timeout_seconds=30):
            order.append(number)

    threads = []
    for number in range(4):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        wait_until(lambda: sum(map(len, pool._places._queues.values())) == len(threads), "nobody queued")
    holder.close()
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2, 3]


def test_ctrl_c_ends_the_wait_for_a_session(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(1)
    with pool.open_repl(), unseen_ctrl_c() as press:
        press()
        pool.open_repl(timeout_seconds=120)
    with pool.open_repl() as repl:  # who gave up waiting holds no place
        assert repl.exec("1").value == "1"


def test_many_threads_share_few_sessions(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(3, ready=1, recovery=False)
    in_use, most, lock = 0, 0, threading.Lock()

    def work(number: int) -> str | None:
        nonlocal in_use, most
        with pool.open_repl(timeout_seconds=60) as repl:
            with lock:
                in_use += 1
                most = max(most, in_use)
            value = repl.exec(f"{number} * 2").value
            with lock:
                in_use -= 1
        return value

    with ThreadPoolExecutor(12) as threads:
        values = list(threads.map(work, range(40)))
    assert values == [str(number * 2) for number in range(40)]
    assert most <= 3


def test_a_session_opened_inside_a_host_function_does_not_wait_for_its_ancestors(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(1)

    def nested(depth: int) -> str:
        if depth == 0:
            return "bottom"
        with pool.open_repl(timeout_seconds=10) as repl:
            repl.bind("nested", nested)
            result = repl.exec(f"nested({depth - 1})")
            assert result.ok, result.error
            return f"{depth} {result.value}"

    assert nested(3) == "3 " + repr("2 " + repr("1 " + repr("bottom")))


def test_nesting_in_parallel_is_bounded_and_ends(make_pool: Callable[..., SessionPool]) -> None:
    """Every host function of both sessions wants two more: they queue on their own level only."""
    pool = make_pool(2, recovery=False)
    lock, in_use, most = threading.Lock(), 0, 0

    def sub(number: int) -> str | None:
        nonlocal in_use, most
        with pool.open_repl(timeout_seconds=60) as repl:
            with lock:
                in_use += 1
                most = max(most, in_use)
            value = repl.exec(f"{number} + 1").value
            with lock:
                in_use -= 1
            return value

    async def async_sub(number: int) -> str | None:
        return await asyncio.to_thread(sub, number)

    def run(_: int) -> str | None:
        with pool.open_repl(timeout_seconds=60) as repl:
            repl.bind("sub", sub)
            repl.bind("async_sub", async_sub)
            result = repl.exec(
                "import asyncio\nfrom concurrent.futures import ThreadPoolExecutor\n"
                "one = list(ThreadPoolExecutor(4).map(sub, range(4)))\n"
                "two = await asyncio.gather(*(async_sub(n) for n in range(4)))\none + two"
            )
            assert result.ok, result.error
            return result.value

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(run, range(4))) == {repr(["1", "2", "3", "4"] * 2)}
    assert most <= 2


def test_session_seconds_begin_when_a_session_is_handed_out(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(1, ready=1, limits=Limits(memory_mb=64, session_seconds=600))
    wait_until(lambda: ready(pool) == 1, "no session is ready")
    session = pool._stock._sessions[0][0]
    assert isinstance(session, SupportsWaiting)
    session._until = 1.0  # type: ignore[attr-defined]  # long ago
    with pool.open_repl() as repl:
        assert repl._session is session  # type: ignore[attr-defined]
        assert repl.exec("1").ok


def test_what_died_while_it_waited_is_not_handed_out(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(2, ready=2)
    wait_until(lambda: ready(pool) == 2, "no sessions are ready")
    sessions = [session for session, _ in pool._stock._sessions]
    for session in sessions:
        os.kill(session._guest._worker_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    wait_until(lambda: all(map(has_news, sessions)), "no supervisor reported the death")
    with pool.open_repl() as repl:
        result = repl.exec("1")
        assert (result.outcome, result.state) == ("ok", "kept")


def test_a_zygote_that_dies_costs_no_caller_anything(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(2, ready=2)
    wait_until(lambda: ready(pool) == 2, "no sessions are ready")
    supervisor = psutil.Process(pool._stock._sessions[0][0]._guest._worker_pid).parent()  # type: ignore[attr-defined]
    assert supervisor is not None
    zygote = supervisor.parent()
    assert zygote is not None
    sessions = [session for session, _ in pool._stock._sessions]
    zygote.kill()
    wait_until(lambda: all(map(has_news, sessions)), "the supervisors live")
    for _ in range(3):
        with pool.open_repl() as repl:
            result = repl.exec("1 + 1")
            assert (result.outcome, result.state, result.value) == ("ok", "kept", "2")


def test_a_closed_pool_ends_what_waits_and_hands_out_nothing(make_pool: Callable[..., SessionPool]) -> None:
    before = {process.pid for process in living(psutil.Process())}
    pool = make_pool(1, ready=1)
    held = pool.open_repl()
    errors: list[Exception] = []

    def wait() -> None:
        try:
            pool.open_repl(timeout_seconds=60)
        except SessionClosed as exc:
            errors.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: sum(map(len, pool._places._queues.values())) == 1, "nobody queued")
    pool.close()
    thread.join(10)
    assert len(errors) == 1
    with pytest.raises(SessionClosed, match="the pool was closed"):
        pool.open_repl()
    assert held.exec("1").ok, "a session in use is its user's"
    held.close()
    wait_until(lambda: {p.pid for p in living(psutil.Process())} <= before | _launchers(), "a process is left")


def _launchers() -> set[int]:
    """The launcher and the zygote live as long as this process."""
    children = psutil.Process().children()
    return {child.pid for child in children} | {grandchild.pid for child in children for grandchild in child.children()}


def test_a_session_that_is_dropped_gives_its_place_back(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(1, ready=0)
    repl = pool.open_repl()
    assert repl.exec("1").ok
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031 - the deletion is what warns
        del repl
        gc.collect()
    pool.open_repl(timeout_seconds=10).close()


def test_a_session_that_ended_by_itself_gives_its_place_back(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(1, ready=0, limits=Limits(memory_mb=64, session_seconds=0.2))
    repl = pool.open_repl()
    wait_until(lambda: repl._session._until < time.monotonic(), "time stands still")  # type: ignore[attr-defined]
    with pytest.raises(SessionClosed, match="session_seconds"):
        repl.exec("1")
    pool.open_repl(timeout_seconds=10).close()
    repl.close()


def test_a_copy_takes_a_place_of_the_pool(make_pool: Callable[..., SessionPool]) -> None:
    pool = make_pool(2, ready=0, timeout_seconds=0.05)
    with pool.open_repl() as repl:
        assert isinstance(repl, SupportsFork)
        assert isinstance(repl, SupportsCheckpoint)
        repl.exec("x = [1]")
        with repl.fork() as copy:
            assert copy.exec("x.append(2)\nx").value == "[1, 2]"
            with pytest.raises(PoolTimeout):
                repl.fork()
        with repl.fork() as copy:
            assert copy.exec("x").value == "[1]"
        point = repl.checkpoint()
        repl.exec("x = None")
        repl.restore(point)
        assert repl.get("x") == [1]


def test_a_zygote_that_died_just_now_costs_the_next_opening_nothing() -> None:
    with open_repl("jail", limits=SMALL) as repl:
        supervisor = psutil.Process(repl._guest._worker_pid).parent()  # type: ignore[attr-defined]
        assert supervisor is not None
        zygote = supervisor.parent()
        assert zygote is not None
        zygote.kill()
        with open_repl("jail", limits=SMALL) as after:
            assert after.exec("1 + 1").value == "2"
        # The session that went with it is empty, says so, and is usable.
        result = repl.exec("2 + 2")
        assert (result.outcome, result.value, result.state) == ("ok", "4", "lost")


def test_one_call_at_a_time_and_the_rest_of_the_contract(make_pool: Callable[..., SessionPool]) -> None:
    repl = make_pool(1).open_repl()
    assert isinstance(repl, REPLProtocol)
    assert repl.limits.memory_mb == 64
    assert repl.capabilities.backend == "jail"
    repl.set("x", [1])
    repl.bind("f", lambda: 5)
    assert repl.exec("x.append(f())", read=("x",)).read == {"x": [1, 5]}
    assert repl.get("x") == [1, 5]
    repl.interrupt()
    repl.reset()
    assert repl.names() == {}
    repl.close()


def test_wrong_arguments_are_refused_before_a_session_is_opened() -> None:
    for error, arguments in (
        (TypeError, {"size": "2"}),
        (TypeError, {"size": True}),
        (ValueError, {"size": 0}),
        (ValueError, {"size": 2, "ready": 3}),
        (TypeError, {"ready": 1.5}),
        (TypeError, {"timeout_seconds": "1"}),
        (ValueError, {"timeout_seconds": float("nan")}),
        (ValueError, {"backend": "no such backend"}),
    ):
        with pytest.raises(error):
            SessionPool(**{"backend": "jail", **arguments})  # type: ignore[arg-type]
