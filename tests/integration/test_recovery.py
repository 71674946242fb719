"""Recovery that does not wear out: kills in a row, during host calls, of cells that made threads or tried to make children."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlm_sandbox import Limits, REPLProtocol, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from ..escape.outside import SessionProcesses

_DEATHS: dict[str, tuple[str, str]] = {
    "exit": ("import os\nos._exit(1)", "crashed"),
    "a signal of its own": ("import os, signal\nsignal.raise_signal(signal.SIGKILL)", "crashed"),
    "a fault": ("import ctypes\nctypes.string_at(1)", "crashed"),
    "a call into C that does not end": ("import itertools\nmax(itertools.count())", "limit"),
    "an interrupt it ignores": (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        "limit",
    ),
    "threads": (
        "import itertools, threading\nfor _ in range(6): threading.Thread(target=max, args=(itertools.count(),)).start()\nmax(itertools.count())",
        "limit",
    ),
    "children": (
        "import os, subprocess\nfor _ in range(20):\n    try: os.fork()\n    except OSError: pass\nos._exit(1)",
        "crashed",
    ),
}
if sys.version_info < (3, 12):  # later ones count the depth of C calls, and say RecursionError
    _DEATHS["a stack that overflows"] = (
        "import sys\nsys.setrecursionlimit(10**8)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "crashed",
    )


@pytest.fixture
def processes() -> Iterator[SessionProcesses]:
    require_usable("jail", load_backend("jail").probe())
    found = SessionProcesses()
    yield found
    found.assert_gone()


@pytest.fixture
def repl(processes: SessionProcesses) -> Iterator[REPLProtocol]:
    with open_repl("jail", limits=Limits(time_seconds=0.1, memory_mb=128)) as session:
        session.bind("host", lambda value: value + 1)
        assert session.exec("x = {'kept': [41]}").ok
        yield session


def as_before(repl: REPLProtocol) -> None:
    result = repl.exec("host(x['kept'][0])", limits=None)
    assert (result.outcome, result.value, result.state) == ("ok", "42", "kept"), result


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(("code", "outcome"), _DEATHS.values(), ids=_DEATHS)
def test_kills_in_a_row_cost_only_themselves(repl: REPLProtocol, processes: SessionProcesses, code: str, outcome: str) -> None:
    repl.exec("0")
    held = descriptors()
    for _ in range(5):
        died = repl.exec("x['kept'] = None\n" + code)
        assert (died.outcome, died.state, died.lost_names) == (outcome, "restored", ()), died
    as_before(repl)
    assert descriptors() <= held + 1  # a look at the worker's size is kept open
    processes.assert_quiet()


def test_kills_of_every_kind_in_turns_with_cells_between(repl: REPLProtocol, processes: SessionProcesses) -> None:
    for number in range(3):
        for code, outcome in _DEATHS.values():
            died = repl.exec("x = None\n" + code)
            assert (died.outcome, died.state) == (outcome, "restored"), died
            assert repl.exec(f"x['n'] = {number}").ok
    as_before(repl)
    assert repl.get("x") == {"kept": [41], "n": 2}
    processes.assert_quiet()


def test_kills_during_host_calls(processes: SessionProcesses) -> None:
    """The function goes on on the host; its late answer reaches nobody, and the next cell has its own."""
    release = threading.Event()
    begun: list[int] = []

    def slow(value: int) -> str:
        begun.append(value)
        release.wait(30)
        return "late"

    with open_repl("jail", limits=Limits(time_seconds=5, wall_seconds=0.3, memory_mb=128)) as repl:
        repl.bind("slow", slow)
        repl.bind("host", lambda value: value + 1)
        assert repl.exec("x = {'kept': [41]}").ok
        for number in range(4):
            stubborn = f"import os\nx = None\nwhile True:\n    try: slow({number})\n    except BaseException: pass"
            died = repl.exec(stubborn)
            assert died.outcome == "limit", died
            assert died.state in ("restored", "kept")
            if died.state == "kept":  # it was between two calls when it was told to end
                assert repl.exec("x = {'kept': [41]}").ok
            as_before(repl)
        in_threads = (
            "import threading, os\nfor n in range(8): threading.Thread(target=slow, args=(n,)).start()\nimport time\n"
            "while True:\n    try: time.sleep(9)\n    except BaseException: pass"
        )
        died = repl.exec("x = None\n" + in_threads)
        assert (died.outcome, died.state) == ("limit", "restored")
        as_before(repl)
        release.set()
        for _ in range(5):
            as_before(repl)
        processes.assert_quiet()


def test_a_worker_killed_from_outside_during_a_host_call(repl: REPLProtocol, processes: SessionProcesses) -> None:
    """As the kernel would, for memory."""
    worker = repl._guest  # type: ignore[attr-defined]
    repl.bind("kill_it", lambda: os.kill(worker._worker_pid, signal.SIGKILL))
    for _ in range(5):
        died = repl.exec("x = None\nkill_it()\nwhile True: pass")
        assert (died.outcome, died.state) == ("crashed", "restored"), died
        as_before(repl)


def test_ctrl_c_before_the_supervisors_answer_is_no_false_word_of_a_restored_state() -> None:
    """The order is out, and its answer comes when another one is waited for: it is not that one's."""
    with open_repl("jail") as repl:
        repl.bind("f", lambda: 7)
        assert repl.exec("x = 41").ok
        guest = repl._guest  # type: ignore[attr-defined]
        receive = guest._receive

        def interrupted(_seconds: float) -> None:
            guest._receive = receive
            raise KeyboardInterrupt

        guest._receive = interrupted
        with pytest.raises(KeyboardInterrupt):
            repl.exec("import os\nos._exit(1)")
        after = repl.exec("f(), 'x' in globals()")
        assert (after.value, after.state, after.lost_names) == ("(7, False)", "lost", ("x",))
        assert repl.exec("f()").state == "kept"


def test_ctrl_c_while_a_guest_is_replaced_loses_the_state_and_not_the_session() -> None:
    with open_repl("jail") as repl:
        repl.bind("f", lambda: 7)
        assert repl.exec("x = 1").ok
        start = repl._start  # type: ignore[attr-defined]

        def interrupted() -> None:
            raise KeyboardInterrupt

        repl._start = interrupted  # type: ignore[attr-defined]
        supervisor = psutil.Process(repl._guest._worker_pid).parent()  # type: ignore[attr-defined]
        assert supervisor is not None
        supervisor.kill()
        with pytest.raises(KeyboardInterrupt):
            repl.exec("x")
        repl._start = start  # type: ignore[attr-defined]
        after = repl.exec("f()")
        assert (after.value, after.state, after.lost_names) == ("7", "lost", ("x",))
        assert repl.reset() is None  # type: ignore[func-returns-value]
        assert repl.exec("f()").state == "kept"
