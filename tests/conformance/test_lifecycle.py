"""The life of a session: reset, names, interrupt, close, threads, setup, and what its capabilities say."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from rlm_sandbox import (
    Capabilities,
    Context,
    ExecResult,
    Feature,
    Grade,
    GuestError,
    Limits,
    REPLProtocol,
    SandboxError,
    SessionBusy,
    SessionClosed,
    UnsupportedLimit,
)
from rlm_sandbox.limits import PER_CELL, PER_SESSION

from ..conftest import VARIANTS, OpenSession, lowest_grade, open_variant
from ..ctrl_c import unseen_ctrl_c
from .support import MISSING, PATIENCE_SECONDS, assert_alive, enforces, needs, ok, run, within

LOOP = "while True:\n    pass"


# ---- close


def test_close_is_idempotent_and_final(repl: REPLProtocol) -> None:
    ok(repl.exec("x = 1"))
    repl.close()
    repl.close()
    calls: list[Callable[[], Any]] = [
        lambda: repl.exec("x = 1"),
        lambda: repl.get("x"),
        lambda: repl.set("x", 1),
        lambda: repl.bind("f", print),
        repl.names,
        repl.reset,
    ]
    for call in calls:
        with pytest.raises(SessionClosed):
            call()


def test_capabilities_and_limits_outlive_the_session(open_session: OpenSession) -> None:
    limits = Limits(time_seconds=3)
    repl = open_session(limits=limits)
    repl.close()
    assert repl.limits == limits
    assert isinstance(repl.capabilities, Capabilities)


def test_a_session_is_a_context_manager(open_session: OpenSession) -> None:
    with open_session() as repl:
        assert run(repl, "x = 1", "x") == 1
    with pytest.raises(SessionClosed):
        repl.exec("x")


def test_the_context_manager_closes_on_an_exception_and_lets_it_through(open_session: OpenSession) -> None:
    repl = open_session()
    with pytest.raises(KeyError, match="mine"), repl:
        raise KeyError("mine")
    with pytest.raises(SessionClosed):
        repl.exec("x")


@enforces("time_seconds")
def test_close_from_another_thread_ends_a_running_cell(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=60))
    started = threading.Event()
    repl.bind("started", started.set)
    came: list[object] = []

    def run_cell() -> None:
        try:
            came.append(repl.exec(f"started()\n{LOOP}"))
        except SessionClosed as exc:
            came.append(exc)

    thread = threading.Thread(target=run_cell)
    thread.start()
    assert started.wait(PATIENCE_SECONDS)
    with within(3):
        repl.close()
        thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert len(came) == 1
    assert isinstance(came[0], SessionClosed | ExecResult)
    if isinstance(came[0], ExecResult):
        assert came[0].outcome != "ok"


# ---- reset


def test_reset_empties_and_applies_setup_and_bindings_again(open_session: OpenSession) -> None:
    repl = open_session(setup="base = 10\ndef plus(n):\n    return base + n")
    repl.bind("f", lambda: "host")
    repl.bind("ctx", Context.from_text("some text"))
    ok(repl.exec("x = 1\nbase = 99"))
    repl.reset()
    assert repl.get("x", MISSING) is MISSING
    assert run(repl, "r = [plus(1), f(), ctx.len_chars()]", "r") == [11, "host", 9]


def test_reset_does_not_bring_back_plain_values(repl: REPLProtocol) -> None:
    repl.set("x", 1)
    repl.reset()
    assert repl.get("x", MISSING) is MISSING
    assert run(repl, "y = 2", "y") == 2


def test_a_shadowed_binding_comes_back_with_reset(repl: REPLProtocol) -> None:
    repl.bind("f", lambda: "host")
    ok(repl.exec("f = 3"))
    assert repl.get("f") == 3
    repl.reset()
    assert run(repl, "r = f()", "r") == "host"


# ---- setup


def test_setup_runs_first(open_session: OpenSession) -> None:
    repl = open_session(setup="import math\nstart = math.floor(3.7)")
    assert run(repl, "r = start + 1", "r") == 4


@pytest.mark.parametrize("setup", ["1 / 0", "def f(:", "undefined_name"])
def test_an_error_in_setup_is_a_guest_error(open_session: OpenSession, setup: str) -> None:
    with pytest.raises(GuestError):
        open_session(setup=setup)


@enforces("time_seconds")
def test_a_setup_that_never_ends_is_bounded(open_session: OpenSession) -> None:
    with within(5), pytest.raises(SandboxError):
        open_session(setup=LOOP, limits=Limits(time_seconds=1.0))


@needs(Feature.SOURCE_TRACEBACKS)
def test_setup_is_no_cell(open_session: OpenSession) -> None:
    repl = open_session(setup="x = 1")
    traceback = repl.exec("undefined_name").traceback
    assert traceback is not None
    assert "<cell 1>" in traceback


# ---- names


def test_names_lists_the_guests_variables(repl: REPLProtocol) -> None:
    repl.bind("f", lambda: 1)
    ok(repl.exec("alpha = [1, 2]\ndef beta():\n    pass\n_private = 1\nlong = 'x' * 1_000_000"))
    found = repl.names()
    assert {"alpha", "beta", "long"} <= set(found)
    assert all(isinstance(name, str) and isinstance(summary, str) for name, summary in found.items())
    assert all(len(summary) <= 500 for summary in found.values())
    assert not {"print", "__builtins__", "__name__", "session_names"} & set(found)


def test_names_of_an_empty_session(repl: REPLProtocol) -> None:
    assert repl.names() == {}


# ---- interrupt


def interrupt_after(repl: REPLProtocol, started: threading.Event) -> threading.Thread:
    def wait_and_interrupt() -> None:
        started.wait(PATIENCE_SECONDS)
        time.sleep(0.2)
        repl.interrupt()

    thread = threading.Thread(target=wait_and_interrupt)
    thread.start()
    return thread


def test_interrupt_from_another_thread_ends_the_cell(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=60))
    started = threading.Event()
    repl.bind("started", started.set)
    ok(repl.exec("x = 1"))
    thread = interrupt_after(repl, started)
    with within(5):
        result = repl.exec(f"started()\n{LOOP}")
    thread.join()
    assert result.outcome == "interrupted"
    assert result.limit is None
    assert_alive(repl, result, x=1)


def test_interrupt_ends_a_cell_that_swallows_everything(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=60))
    started = threading.Event()
    repl.bind("started", started.set)
    ok(repl.exec("x = 1"))
    thread = interrupt_after(repl, started)
    with within(5):
        result = repl.exec(
            "started()\nwhile True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass"
        )
    thread.join()
    assert result.outcome == "interrupted"
    assert_alive(repl, result, x=1)


def test_interrupt_ends_a_cell_that_waits_for_the_host(open_session: OpenSession) -> None:
    repl = open_session()
    started, release = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        release.wait()

    repl.bind("slow", slow)
    ok(repl.exec("x = 1"))
    thread = interrupt_after(repl, started)
    try:
        with within(5):
            result = repl.exec("slow()")
        assert result.outcome == "interrupted"
        assert_alive(repl, result, x=1)
    finally:
        release.set()
        thread.join()


def test_interrupt_without_a_cell_does_nothing(repl: REPLProtocol) -> None:
    repl.interrupt()
    repl.interrupt()
    assert run(repl, "x = 1", "x") == 1
    repl.interrupt()
    assert run(repl, "y = sum(range(100_000))", "y") == 4_999_950_000


# ---- threads


def test_calls_may_come_from_several_threads(repl: REPLProtocol) -> None:
    failures: list[BaseException] = []

    def step(n: int) -> None:
        try:
            assert run(repl, f"x = {n}", "x") == n
        except BaseException as exc:
            failures.append(exc)

    for n in range(5):
        thread = threading.Thread(target=step, args=(n,))
        thread.start()
        thread.join()
    assert failures == []


def test_a_second_call_from_another_thread_is_refused(repl: REPLProtocol) -> None:
    started, release = threading.Event(), threading.Event()

    def slow() -> str:
        started.set()
        release.wait(PATIENCE_SECONDS)
        return "done"

    repl.bind("slow", slow)
    results: list[ExecResult] = []
    thread = threading.Thread(target=lambda: results.append(repl.exec("r = slow()")))
    thread.start()
    assert started.wait(PATIENCE_SECONDS)
    try:
        with pytest.raises(SessionBusy):
            repl.exec("x = 1")
        with pytest.raises(SessionBusy):
            repl.get("x")
    finally:
        release.set()
        thread.join()
    assert ok(results[0])
    assert repl.get("r") == "done"


def test_the_thread_that_opened_a_session_may_end(open_session: OpenSession) -> None:
    opened: list[REPLProtocol] = []
    thread = threading.Thread(target=lambda: opened.append(open_session()))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert run(opened[0], "x = 1", "x") == 1


def test_sessions_run_side_by_side(open_session: OpenSession) -> None:
    sessions = [open_session() for _ in range(3)]
    barrier = threading.Barrier(3)

    def meet() -> int:
        return barrier.wait(PATIENCE_SECONDS)

    results: list[ExecResult] = []
    threads = []
    for session in sessions:
        session.bind("meet", meet)
        threads.append(threading.Thread(target=lambda session=session: results.append(session.exec("r = meet()"))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.outcome for result in results] == ["ok"] * 3


# ---- capabilities


def test_capabilities_are_complete(repl: REPLProtocol, backend: str) -> None:
    capabilities = repl.capabilities
    assert capabilities.backend == VARIANTS[backend][0]
    assert capabilities.isolation
    for name in (*PER_CELL, *PER_SESSION, "crash", "interrupt"):
        assert isinstance(capabilities.grade(name), Grade)
    assert all(isinstance(feature, Feature) for feature in capabilities.language)
    assert capabilities.recovery in ("none", "kept", "standby", "replay", "dump")
    assert isinstance(repl, REPLProtocol)


def test_limits_are_those_asked_for(open_session: OpenSession) -> None:
    limits = Limits(time_seconds=7, output_bytes=1234)
    assert open_session(limits=limits).limits == limits


def test_a_grade_below_the_accepted_one_is_refused_at_the_start(backend: str, capabilities: Capabilities) -> None:
    if lowest_grade(capabilities, Limits()) >= Grade.HARD:
        with open_variant(backend, trusted=capabilities.crash < Grade.HARD or capabilities.interrupt < Grade.HARD) as repl:
            ok(repl.exec("x = 1"))
        return
    with pytest.raises(UnsupportedLimit):
        open_variant(backend, trusted=True)
    with pytest.raises(UnsupportedLimit):
        open_variant(backend, accept=Grade.NONE)


@pytest.mark.parametrize("code", ["while True: pass", "f()"], ids=["guest busy", "in a host call"])
def test_ctrl_c_ends_the_cell_is_raised_and_leaves_the_session_usable(repl: REPLProtocol, code: str) -> None:
    never = threading.Event()
    repl.bind("f", never.wait)
    ok(repl.exec("kept = 41"))
    # To the main thread, where the handler runs: as a terminal's Ctrl-C does. Begun by the cell: outside it would end the tests.
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    repl.bind("begun", timer.start)
    with pytest.raises(KeyboardInterrupt):
        repl.exec(f"begun()\n{code}")
    timer.join()
    assert run(repl, "x = kept + 1", "x") == 42
    never.set()


@pytest.mark.parametrize("code", ["while True: pass", "f()"], ids=["guest busy", "in a host call"])
def test_ctrl_c_that_does_not_end_the_wait_is_noticed_all_the_same(open_session: OpenSession, code: str) -> None:
    """See `unseen_ctrl_c`. The session's limit is far away, and without recovery nothing else wakes the host meanwhile."""
    repl = open_session(limits=Limits(time_seconds=60), recovery=False)
    never = threading.Event()
    repl.bind("f", lambda: never.wait(60))
    with unseen_ctrl_c() as press:
        repl.bind("running", press)
        repl.exec(f"running()\n{code}")
    never.set()
    assert repl.exec("x = 1").outcome == "ok"  # where it came at the worst moment of all, its state is restored
