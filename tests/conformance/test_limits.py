"""Semantics 5 to 7 of the design: limits that bind whatever a cell does, and a killed cell that costs only itself."""

from __future__ import annotations

import threading
import time

import pytest

from rlm_sandbox import (
    Capabilities,
    Context,
    ExecResult,
    Feature,
    Grade,
    LimitExceeded,
    Limits,
    Opaque,
    REPLProtocol,
    SessionClosed,
    UnsendableValue,
)

from ..conftest import OpenSession
from .support import MISSING, assert_alive, enforces, error_type, needs, ok, only_if, run, within

LOOP = "while True:\n    pass"


def assert_limit(result: ExecResult, kind: str, limit: float) -> None:
    assert result.outcome == "limit", f"{result.outcome}: {result.error}"
    assert result.limit is not None
    assert (result.limit.kind, result.limit.limit) == (kind, limit)
    assert result.limit.source in ("kernel", "host", "guest")


# ---- time

_BUSY = {
    "loop": LOOP,
    "swallow": "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
    "finally": "def f():\n    while True:\n        try:\n            while True:\n                pass\n        finally:\n            f()\nf()",
    "nested finally": "try:\n    while True:\n        pass\nfinally:\n    while True:\n        pass",
    "long C call": "r = sum(range(10**12))",
}


@enforces("time_seconds")
@pytest.mark.parametrize("code", _BUSY.values(), ids=_BUSY)
def test_a_busy_cell_ends_at_its_time(open_session: OpenSession, code: str) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    ok(repl.exec("x = [1, 2]"))
    with within(5):
        result = repl.exec(code)
    if result.outcome != "error":  # the recursion of "finally" may reach its own end first
        assert_limit(result, "time_seconds", 1.0)
    assert_alive(repl, result, x=[1, 2])


_IGNORE_SIGNALS = (
    "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass"
)


@enforces("time_seconds")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import time\ntime.sleep(3600)", id="sleep"),
        pytest.param(
            "import time\nwhile True:\n    try:\n        time.sleep(100)\n    except BaseException:\n        pass",
            id="sleep, swallow",
        ),
        pytest.param("import threading\nthreading.Event().wait()", id="event", marks=needs(Feature.THREADS)),
        pytest.param(_IGNORE_SIGNALS, id="signals ignored", marks=needs(Feature.CPYTHON)),
    ],
)
def test_a_waiting_or_stubborn_cell_ends_at_its_time(open_session: OpenSession, code: str) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    ok(repl.exec("x = {'a': 1}"))
    with within(5):
        result = repl.exec(code)
    assert_limit(result, "time_seconds", 1.0)
    assert_alive(repl, result, x={"a": 1})


@enforces("time_seconds")
@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(a+)+$", "(a*)*b", "(.*)(.*)(.*)(.*)(.*)[^a]$"])
def test_a_catastrophic_regex_ends_in_time(open_session: OpenSession, pattern: str) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    ok(repl.exec("import re\nx = 1"))
    with within(5):
        result = repl.exec(f"r = re.match({pattern!r}, 'a' * 200 + 'c')")
    assert result.outcome in ("limit", "error", "ok")  # an engine of linear time may well answer
    assert_alive(repl, result, x=1)


@enforces("time_seconds")
@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(a+)+$"])
def test_a_catastrophic_regex_on_the_context_ends_in_time(open_session: OpenSession, pattern: str) -> None:
    """Wherever the context is: a guest's regular expression never runs unbounded on the host."""
    repl = open_session(limits=Limits(time_seconds=1.0, wall_seconds=8.0))
    repl.bind("ctx", Context.from_text("a" * 200 + "c"))
    ok(repl.exec("x = 1"))
    with within(9):
        result = repl.exec(f"r = ctx.find({pattern!r}, regex=True)")
    assert result.outcome in ("limit", "error", "ok")
    assert_alive(repl, result, x=1)


@enforces("time_seconds")
def test_a_killed_cell_leaves_no_variable_of_its_own_when_restored(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    ok(repl.exec("x = 1"))
    result = repl.exec(f"x = 2\nmine = 1\n{_BUSY['swallow']}")
    if result.state == "kept":
        assert (repl.get("x"), repl.get("mine")) == (2, 1)
    else:
        expected = 1 if result.state == "restored" else MISSING
        assert (repl.get("x", MISSING), repl.get("mine", MISSING)) == (expected, MISSING)


@enforces("time_seconds")
@only_if(lambda capabilities: capabilities.soft_interrupt, "has no soft interrupt")
def test_a_soft_interrupt_keeps_what_the_cell_did(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    result = repl.exec(f"done = []\nfor i in range(3):\n    done.append(i)\n{LOOP}")
    assert_limit(result, "time_seconds", 1.0)
    assert result.state == "kept"
    assert repl.get("done") == [0, 1, 2]


def test_limits_of_months_are_no_error(open_session: OpenSession) -> None:
    """A poll takes milliseconds as a C int, which 25 days overflow."""
    months = 10_000_000
    repl = open_session(limits=Limits(time_seconds=months, wall_seconds=months, session_seconds=months))
    ok(repl.exec("x = 1"))
    ok(repl.exec("x += 1"))
    assert repl.get("x") == 2


@enforces("time_seconds")
def test_one_limit_after_another(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=0.4))
    ok(repl.exec("n = 0"))
    for _ in range(3):
        result = repl.exec(_BUSY["swallow"])
        assert_limit(result, "time_seconds", 0.4)
        if result.state == "lost":
            ok(repl.exec("n = 0"))
        ok(repl.exec("n += 1"))
    assert repl.get("n") == 3 or repl.capabilities.recovery == "none"


@enforces("time_seconds")
@only_if(lambda capabilities: capabilities.recovery in ("standby", "replay", "dump"), "has no recovery to switch off")
def test_without_recovery_a_killed_cell_costs_the_variables(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=0.5), recovery=False, setup="base = 'from setup'")
    repl.bind("f", lambda: "from the host")
    ok(repl.exec("x = 1"))
    result = repl.exec(_BUSY["swallow"])
    assert_limit(result, "time_seconds", 0.5)
    assert not result.protected
    if result.state == "lost":
        assert "x" in result.lost_names
        assert repl.get("x", MISSING) is MISSING
    assert run(repl, "r = (base, f())", "r") == ("from setup", "from the host")


@enforces("time_seconds")
def test_waiting_for_the_host_is_not_the_guests_time(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    repl.bind("slow", lambda: time.sleep(2.0))
    result = ok(repl.exec("slow()\ndone = 1"))
    assert repl.get("done") == 1
    if result.usage.time_seconds is not None:
        assert result.usage.time_seconds < 1.0
    if result.usage.wall_seconds is not None:
        assert result.usage.wall_seconds >= 1.9


@enforces("time_seconds")
def test_host_calls_do_not_reset_the_clock(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0, host_calls=None))
    repl.bind("tick", lambda: None)
    with within(10):
        result = repl.exec("while True:\n    tick()")
    assert_limit(result, "time_seconds", 1.0)
    assert run(repl, "x = 1", "x") == 1


@enforces("time_seconds")
def test_a_host_call_longer_than_the_limit_does_not_stop_the_clock_for_good(open_session: OpenSession) -> None:
    """Away from the main thread, where no signal of the host's can help."""
    repl = open_session(limits=Limits(time_seconds=0.5))
    repl.bind("slow", lambda: time.sleep(1.0))
    results: list[ExecResult] = []
    thread = threading.Thread(target=lambda: results.append(repl.exec(f"slow()\n{LOOP}")), daemon=True)
    thread.start()
    thread.join(20)
    assert results, "the cell goes on for ever"
    assert_limit(results[0], "time_seconds", 0.5)
    assert run(repl, "x = 1", "x") == 1


@enforces("wall_seconds")
def test_wall_time_ends_a_cell_whose_host_function_never_returns(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(wall_seconds=1.0))
    release = threading.Event()
    repl.bind("never", release.wait)
    ok(repl.exec("x = 1"))
    try:
        with within(3):
            result = repl.exec("never()")
        assert_limit(result, "wall_seconds", 1.0)
        assert_alive(repl, result, x=1)
    finally:
        release.set()


@enforces("wall_seconds")
def test_a_late_answer_is_refused(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(wall_seconds=1.0))
    release, returned = threading.Event(), threading.Event()

    def slow() -> str:
        release.wait()
        returned.set()
        return "late"

    repl.bind("slow", slow)
    repl.bind("quick", lambda: "in time")
    ok(repl.exec("r = 'unset'"))
    assert repl.exec("r = slow()").outcome == "limit"
    release.set()
    assert returned.wait(20)
    assert run(repl, "q = quick()", "q") == "in time"
    assert repl.get("r", "unset") == "unset"


@enforces("session_seconds")
def test_session_seconds_ends_the_session(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(session_seconds=3, time_seconds=60))
    with within(5):
        result = repl.exec(LOOP)
    assert result.outcome == "limit"
    assert result.limit is not None
    assert result.limit.kind == "session_seconds"
    with pytest.raises(SessionClosed):
        repl.exec("x = 1")


@enforces("session_seconds")
def test_an_idle_session_ends_too(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(session_seconds=1.5))  # its start is a part of it
    time.sleep(2.0)
    with pytest.raises(SessionClosed):
        repl.exec("x = 1")


# ---- memory

_HUNGRY = {
    "one string": "big = 'a' * 10**10",
    "growing list": "big = []\nwhile True:\n    big.append('x' * 1_000_000 + str(len(big)))",
    "doubling": "big = 'x'\nwhile True:\n    big += big",
    "many small": "big = [[i] for i in range(10**9)]",
}


@enforces("memory_mb")
@pytest.mark.parametrize("code", _HUNGRY.values(), ids=_HUNGRY)
def test_a_hungry_cell_hits_the_memory_limit(open_session: OpenSession, code: str) -> None:
    repl = open_session(limits=Limits(memory_mb=128, time_seconds=60))
    ok(repl.exec("x = 'kept'"))
    result = repl.exec(code)
    if result.outcome == "error":  # an allocation that was refused is an ordinary exception of the cell
        assert error_type(result) in ("MemoryError", "OverflowError")  # more than a 32-bit guest can count
    else:
        assert_limit(result, "memory_mb", 128)
    # A refused allocation keeps what the cell had: an ordinary cell must be able to give it back.
    if result.state == "kept":
        ok(repl.exec("big = None"))
    assert_alive(repl, result, x="kept")


def test_huge_numbers_end_in_time(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    ok(repl.exec("x = 1"))
    with within(5):
        result = repl.exec("r = 3 ** (10 ** 8)\ns = str(r)")
    assert result.outcome in ("limit", "error")
    assert_alive(repl, result, x=1)


# ---- death


@only_if(lambda capabilities: capabilities.crash > Grade.NONE, "a death of its guest is the death of this process")
@needs(Feature.CPYTHON)
@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "import os\nos.kill(os.getpid(), 9)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "t = ()\nfor _ in range(3_000_000):\n    t = (t,)\nhash(t)",
    ],
    ids=["exit", "kill", "segv", "stack overflow"],
)
def test_a_death_is_a_result(repl: REPLProtocol, code: str) -> None:
    ok(repl.exec("x = [1]\ndef f():\n    return x"))
    result = repl.exec(code)
    assert result.outcome == "crashed", f"{result.outcome}: {result.error}"
    assert result.state in ("restored", "lost")
    assert_alive(repl, result, x=[1])


# ---- budgets


def test_the_host_call_budget_ends_the_cell(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(host_calls=5))
    calls: list[int] = []
    repl.bind("f", calls.append)
    ok(repl.exec("x = 1"))
    result = repl.exec("for i in range(10):\n    f(i)")
    assert_limit(result, "host_calls", 5)
    assert calls == [0, 1, 2, 3, 4]
    assert_alive(repl, result, x=1)


def test_the_host_call_budget_cannot_be_swallowed(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(host_calls=3, time_seconds=5))
    calls: list[int] = []
    repl.bind("f", calls.append)
    result = repl.exec("i = 0\nwhile True:\n    try:\n        f(i)\n    except BaseException:\n        pass\n    i += 1")
    assert result.outcome == "limit"
    assert len(calls) == 3


def test_limits_hit_in_a_host_call_one_after_another(open_session: OpenSession) -> None:
    """The cell is ended while its call is on the way: wherever that meets the guest, the next turn finds it in step."""
    repl = open_session(limits=Limits(host_calls=3, time_seconds=5))
    repl.bind("f", lambda i: None)
    ok(repl.exec("x = 1"))
    for _ in range(25):
        result = repl.exec("for i in range(10):\n    f(i)")
        assert_limit(result, "host_calls", 3)
        assert_alive(repl, result, x=1)
        if result.state == "lost":
            ok(repl.exec("x = 1"))


def test_the_host_call_budget_is_per_cell(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(host_calls=5))
    repl.bind("f", lambda: 1)
    for _ in range(3):
        assert run(repl, "r = sum([f() for _ in range(5)])", "r") == 5


def test_a_value_too_large_to_send_is_refused(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(value_bytes=10_000))
    with pytest.raises(UnsendableValue):
        repl.set("x", "a" * 20_000)
    with pytest.raises(UnsendableValue):
        repl.set("x", ["a" * 500] * 100)
    assert repl.get("x", MISSING) is MISSING
    repl.set("x", "a" * 5_000)
    assert run(repl, "r = len(x)", "r") == 5_000


def test_a_value_too_large_to_read_is_refused(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(value_bytes=10_000))
    ok(repl.exec("big = 'a' * 20_000"))
    with pytest.raises(LimitExceeded) as caught:
        repl.get("big")
    assert caught.value.kind == "value_bytes"
    assert run(repl, "r = len(big)", "r") == 20_000


def test_arguments_too_large_fail_the_call_and_not_the_session(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(value_bytes=10_000))
    calls: list[str] = []
    repl.bind("f", calls.append)
    ok(repl.exec("x = 1"))
    result = repl.exec("r = 'before'\ntry:\n    f('a' * 20_000)\nexcept Exception as e:\n    r = 'refused'")
    assert calls == []
    if result.outcome == "ok":
        assert repl.get("r") == "refused"
    else:
        assert_limit(result, "value_bytes", 10_000)
    assert_alive(repl, result, x=1)


def test_an_answer_too_large_fails_the_call_and_not_the_session(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(value_bytes=10_000))
    repl.bind("f", lambda: "a" * 20_000)
    assert run(repl, "try:\n    r = f()\nexcept Exception:\n    r = 'refused'", "r") == "refused"


def test_a_huge_echo_is_bounded(repl: REPLProtocol) -> None:
    result = repl.exec("'a' * 3_000_000")
    assert result.outcome == "ok"
    assert result.value is None or len(result.value) <= 3_000_002


@pytest.mark.parametrize("limits", [Limits(time_seconds=11), Limits(time_seconds=None), Limits(output_bytes=1 << 20)])
def test_exec_may_only_narrow(repl: REPLProtocol, limits: Limits) -> None:
    with pytest.raises(ValueError, match="only narrow"):
        repl.exec("x = 1", limits=limits)
    assert repl.get("x", MISSING) is MISSING


@pytest.mark.parametrize("limits", [Limits(memory_mb=100), Limits(processes=2), Limits(session_seconds=5)])
def test_exec_cannot_change_a_limit_of_the_session(repl: REPLProtocol, limits: Limits) -> None:
    with pytest.raises(ValueError, match="session"):
        repl.exec("x = 1", limits=limits)
    assert repl.get("x", MISSING) is MISSING


@enforces("time_seconds")
def test_exec_narrows_one_cell(repl: REPLProtocol) -> None:
    with within(3):
        result = repl.exec(LOOP, limits=Limits(time_seconds=0.5))
    assert_limit(result, "time_seconds", 0.5)
    assert repl.limits.time_seconds == 10.0


# ---- reading runs guest code too


@enforces("time_seconds")
@needs(Feature.CLASSES)
def test_a_repr_that_never_ends_is_bounded_in_get(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    ok(repl.exec("class Slow:\n    def __repr__(self):\n        while True:\n            pass\nx = 1\nslow = Slow()"))
    with within(5):
        try:
            assert isinstance(repl.get("slow"), Opaque)  # where no repr of the guest runs
        except LimitExceeded as exc:
            kind = exc.kind
        else:
            kind = "time_seconds"
    assert kind == "time_seconds"
    assert repl.exec("y = 2").outcome == "ok"  # its state may say that the session was restored in between
    assert repl.get("y") == 2


# ---- what is promised


@pytest.mark.parametrize("limit", ["time_seconds", "wall_seconds", "output_bytes", "host_calls", "value_bytes", "session_seconds"])
def test_the_host_side_limits_are_enforced_somehow(capabilities: Capabilities, limit: str) -> None:
    assert capabilities.grade(limit) > Grade.NONE


def test_usage_is_measured_or_none(repl: REPLProtocol) -> None:
    repl.bind("f", lambda: None)
    usage = ok(repl.exec("print('12345')\nf()\nf()")).usage
    assert usage.output_bytes in (None, 6)
    assert usage.host_calls in (None, 2)
    for seconds in (usage.time_seconds, usage.wall_seconds, usage.cpu_seconds):
        assert seconds is None or 0 <= seconds < 30
    assert usage.memory_mb is None or usage.memory_mb > 0
