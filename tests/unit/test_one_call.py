"""One call at a time, whatever a signal handler raises, and wherever."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import pytest

from rlm_sandbox import Grade, Limits, REPLProtocol, SessionBusy, open_repl
from rlm_sandbox.bridge.one_call import Mark, OneCall
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable

#: What begins and ends a call. The turn between has tests of its own.
_ENDS = frozenset(
    {"names", "_call", "_entered", "__init__", "__enter__", "__exit__", "_enter_call", "_leave_call", "take", "give_back"}
)


class _Hit(Exception):
    """A signal handler's."""


def _interrupted_at(step: int, call: Any) -> bool:
    """Make the call, and raise before the bytecode of that number in what begins and ends it. False if there are not so many."""
    left = step

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if not (code.co_name in _ENDS and code.co_filename.endswith("session.py")) and not code.co_filename.endswith("one_call.py"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise _Hit
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # 3.12 looks for such a frame only when a tracer is set
    sys.settrace(trace)
    try:
        call()
    except _Hit:
        return True
    finally:
        sys.settrace(before)
    return False


def _open(backend: str) -> REPLProtocol:
    require_usable(backend, load_backend(backend).probe())
    if backend == "restricted":
        return open_repl(backend, limits=Limits(), accept=Grade.NONE, trusted=True)
    return open_repl(backend, recovery=False)


@pytest.mark.parametrize("kind", ["jail", "restricted"])
def test_an_exception_between_any_two_bytecodes_leaves_the_session_usable(kind: str) -> None:
    with _open(kind) as repl:
        repl.exec("kept = 41")
        step = 1
        while _interrupted_at(step, repl.names):
            assert repl.exec("kept + 1").value == "42", step
            step += 1
        assert step > 60, step


def test_a_frame_that_was_left_holds_nothing() -> None:
    calls = OneCall()

    def leaves() -> Mark:
        mark = Mark(sys._getframe())
        assert calls.take(mark)
        assert not calls.take(Mark(sys._getframe()))  # the same thread, from within
        return mark

    left = leaves()
    mine = Mark(sys._getframe())
    assert calls.take(mine)
    calls.give_back(left)  # too late: it is another's
    assert not calls.take(Mark(sys._getframe()))
    calls.give_back(mine)
    assert calls.take(Mark(sys._getframe()))


def test_another_thread_never_takes_what_is_held() -> None:
    calls = OneCall()

    def leaves() -> None:
        assert calls.take(Mark(sys._getframe()))

    leaves()
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(calls.take(Mark(sys._getframe()))))
    thread.start()
    thread.join(20)
    assert taken == [False]


def test_a_call_from_within_is_refused() -> None:
    with _open("restricted") as repl:
        said: list[str] = []

        def again() -> None:
            try:
                repl.names()
            except SessionBusy as exc:
                said.append(str(exc))

        repl.bind("again", again, inline=True)
        repl.exec("again()")
        assert len(said) == 1
