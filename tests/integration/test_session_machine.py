"""A whole jail session, driven at random against a model: cells that end in every way, kills from outside at any moment.

The model is a dict of what the names should hold. After a kill the state may be one of several that the contract allows, and
the session has to say which: ``restored`` is as before the killed cell (a worker that is killed while its standby is made
falls back to the one before: as before the last cell), ``lost`` is empty, with ``lost_names`` right.

About 10 s alone. ``RLM_SANDBOX_EXAMPLES=1000 pytest tests/integration/test_session_machine.py --timeout 7200`` goes deep.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any, Final

import psutil
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlm_sandbox import ExecResult, GuestCrashed, Limits, SessionBusy, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from ..values import plain_values, same

EXAMPLES: Final = int(os.environ.get("RLM_SANDBOX_EXAMPLES", "15"))
STEPS: Final = 15
NAMES: Final = ("a", "b", "c", "d")
SHORT: Final = Limits(time_seconds=0.15)
MISSING: Final = object()
#: A cell that no interrupt ends.
STUBBORN: Final = "sum(range(10**13))"
CRASHES: Final = (
    "import os; os._exit(0)",
    "import os; os.abort()",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import ctypes; ctypes.string_at(0)",
    "import os; os.closerange(3, 30)",
)

names = st.sampled_from(NAMES)
values = plain_values(max_leaves=6)
delays = st.floats(0, 0.03)
victims = st.sampled_from(["worker", "worker", "worker", "standby", "supervisor"])

State = dict[str, Any]


def equal(found: State, state: State) -> bool:
    """The same names with the same values of the same types."""
    return found.keys() == state.keys() and all(same(found[name], state[name]) for name in found)


def after(seconds: float, action: Any) -> threading.Thread:
    """Do that on another thread, in a moment."""

    def run() -> None:
        time.sleep(seconds)
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


class Session(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.repl: Any = None
        self.recovery = True
        self.model: State = {}
        self.before: State = {}
        """As before the last cell: what a worker falls back to that dies while its standby is made."""
        self.killed = False
        """Something was killed from outside, and no result has told yet what became of the state."""

    @initialize(recovery=st.sampled_from([True, True, True, False]))
    def open(self, recovery: bool) -> None:
        self.repl = open_repl("jail", limits=Limits(memory_mb=128), setup="base = 10", recovery=recovery)
        self.recovery = recovery
        self.repl.bind("double", lambda value: [value, value])
        self.repl.bind("busy", self._busy, inline=True)

    def teardown(self) -> None:
        if self.repl is None:
            return
        processes = self._processes()
        self.repl.close()
        _, alive = psutil.wait_procs(processes, 3)
        assert not alive, "a process outlived its session"

    def _busy(self) -> bool:
        try:
            self.repl.get("a")
        except SessionBusy:
            return True
        return False

    # ---- what the session says

    def settle(self, result: ExecResult, changes: State, *, removed: str = "") -> None:
        """The names hold what the result says of them: with the cell's changes if it was not undone, without if it was."""
        before, killed = self.possible(result.state, [self.model, self.before]), self.killed
        after = [{name: value for name, value in {**state, **changes}.items() if name != removed} for state in before]
        if result.outcome in ("ok", "error"):
            allowed = after
        elif result.outcome in ("limit", "interrupted"):
            allowed = (
                [*before, *after] if killed or result.outcome == "interrupted" else after if result.state == "kept" else before
            )
        else:
            assert result.state != "kept"
            allowed = before
        if result.state == "lost":
            self.check_lost(result)
        found = self.repl.exec("", read=NAMES)
        if killed and found.outcome == "crashed":  # the kernel's word of a death between the turns came within this one
            allowed = self.possible(found.state, [*allowed, *before])
            found = self.repl.exec("", read=NAMES)
        assert found.ok, found.error
        if found.state != "kept":  # it was killed after the end of its turn
            assert killed
            allowed = self.possible(found.state, [*allowed, *before])
        self.model = self.before = dict(found.read)
        self.killed = False
        assert any(equal(self.model, state) for state in allowed), f"{self.model} is none of {allowed}; {result}"

    def possible(self, state: str, states: list[State]) -> list[State]:
        if state == "lost":
            assert self.killed or not self.recovery, "a session with a recovery point behind it was lost"
            return [{}]
        return states if state == "restored" and self.killed else states[:1] if state == "kept" or not self.killed else states

    def check_lost(self, result: ExecResult) -> None:
        assert set(self.model) & set(self.before) <= set(result.lost_names) <= set(NAMES)

    def cell(self, code: str, changes: State, *expected: str, removed: str = "", **kwargs: Any) -> ExecResult:
        """A cell that comes to one of the ``expected`` outcomes; after a kill the news of it may come within the cell."""
        result: ExecResult = self.repl.exec(code, **kwargs)
        assert result.outcome in (*expected, *(["crashed"] if self.killed else [])), result
        self.settle(result, changes, removed=removed)
        return result

    # ---- cells

    @rule(name=names, value=st.integers() | st.text(max_size=20))
    def assign(self, name: str, value: Any) -> None:
        result = self.cell(f"{name} = {value!r}\n{name}", {name: value}, "ok")
        assert not result.ok or result.value == repr(value)

    @rule(name=names)
    def delete(self, name: str) -> None:
        self.cell(f"globals().pop({name!r}, None)", {}, "ok", removed=name)

    @rule(name=names, number=st.integers())
    def error(self, name: str, number: int) -> None:
        result = self.cell(f"{name} = {number}\n1 / 0", {name: number}, "error")
        assert result.outcome == "crashed" or result.error == "ZeroDivisionError: division by zero"

    @rule(name=names, number=st.integers())
    def limit(self, name: str, number: int) -> None:
        self.cell(f"{name} = {number}\nwhile True: pass", {name: number}, "limit", limits=SHORT)

    @rule(name=names)
    def stubborn_limit(self, name: str) -> None:
        assert self.cell(f"{name} = 'never'\n{STUBBORN}", {name: "never"}, "limit", limits=SHORT).state != "kept"

    @rule(name=names, code=st.sampled_from(CRASHES))
    def crash(self, name: str, code: str) -> None:
        self.cell(f"{name} = 'never'\n{code}", {name: "never"}, "crashed", "violation")

    @rule(name=names, number=st.integers())
    def host_call(self, name: str, number: int) -> None:
        self.cell(f"assert busy()\n{name} = double({number})", {name: [number, number]}, "ok")

    @rule(name=names, delay=delays)
    def interrupt(self, name: str, delay: float) -> None:
        ended = threading.Event()

        def interrupt() -> None:  # again and again: the first may come before the call
            while not ended.wait(0.01):
                self.repl.interrupt()

        thread = after(delay, interrupt)
        result = self.repl.exec(f"{name} = 'begun'\nwhile True: pass", limits=Limits(time_seconds=5))
        ended.set()
        thread.join()
        assert result.outcome == "interrupted" or (self.killed and result.outcome == "crashed")
        self.settle(result, {name: "begun"})

    # ---- values

    @precondition(lambda self: not self.killed)
    @rule(name=names, value=values)
    def set_value(self, name: str, value: Any) -> None:
        self.repl.set(name, value)
        self.model = {**self.model, name: value}

    @precondition(lambda self: not self.killed)
    @rule(name=names)
    def get_value(self, name: str) -> None:
        found = self.repl.get(name, MISSING)
        assert found is MISSING if name not in self.model else same(found, self.model[name])

    @precondition(lambda self: not self.killed)
    @rule(name=names)
    def bind(self, name: str) -> None:
        self.repl.bind(f"f_{name}", lambda: name)
        self.cell(f"{name} = f_{name}()", {name: name}, "ok")

    @precondition(lambda self: not self.killed)
    @rule()
    def list_names(self) -> None:
        assert set(self.repl.names()) == self.model.keys()

    @rule()
    def reset(self) -> None:
        self.repl.reset()
        self.model, self.before, self.killed = {}, {}, False
        result = self.repl.exec("base, double(1)")
        assert (result.value, result.state) == ("(10, [1, 1])", "kept")

    # ---- kills from outside

    def _processes(self) -> list[psutil.Process]:
        """Supervisor, worker and standby, seen from the host."""
        try:
            supervisor = psutil.Process(self.repl._guest._worker_pid).parent()
        except psutil.NoSuchProcess:
            return []
        return [] if supervisor is None else [supervisor, *supervisor.children(recursive=True)]

    def kill(self, which: str) -> None:
        worker = self.repl._guest._worker_pid
        for index, process in enumerate(self._processes()):
            kind = "supervisor" if not index else "worker" if process.pid == worker else "standby"
            if kind != which:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.001)

    @precondition(lambda self: not self.killed)
    @rule(which=victims, waits=st.booleans())
    def kill_between(self, which: str, waits: bool) -> None:
        if waits:
            time.sleep(0.02)  # by then the standby is there
        self.killed = True
        self.kill(which)

    @precondition(lambda self: not self.killed)
    @rule(which=victims, delay=delays, name=names, number=st.integers())
    def kill_within(self, which: str, delay: float, name: str, number: int) -> None:
        self.killed = True
        thread = after(delay, lambda: self.kill(which))
        result = self.repl.exec(f"{name} = {number}\nfor _ in range(10): double(1)\nsum(range(100_000))")
        thread.join()
        assert result.outcome in ("ok", "crashed"), result
        self.settle(result, {name: number})

    @precondition(lambda self: not self.killed)
    @rule(which=victims, name=names)
    def kill_in_a_plain_call(self, which: str, name: str) -> None:
        self.killed = True
        thread = after(0.0, lambda: self.kill(which))
        with contextlib.suppress(GuestCrashed):
            self.repl.get(name)
        thread.join()
        self.settle(self.repl.exec("base"), {})

    @invariant()
    def alive(self) -> None:
        if self.repl is not None and not self.killed:
            assert self.repl.exec("base").value == "10"
            self.before = self.model


@pytest.fixture(autouse=True)
def usable() -> None:
    require_usable("jail", load_backend("jail").probe())


Session.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestSession = Session.TestCase
