"""What comes too late for its turn, its cell or its session reaches nobody else."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import Any

import pytest

from rlm_sandbox.bridge.handles import CallFailed, HostCall, Outcome
from rlm_sandbox.bridge.host_pool import HostPool
from rlm_sandbox.bridge.turn import WakePipe


def call(function: Any, *args: Any) -> HostCall:
    return HostCall("f", function, args, {}, False, False, ())


def test_a_wake_after_the_end_writes_to_nobody() -> None:
    """The numbers of the closed pipe belong to somebody else by then: to another session's channel, say."""
    wake = WakePipe()
    wake.wake()
    wake.drain()
    wake.close()
    wake.close()
    read, write = os.pipe()  # takes the same numbers
    try:
        os.set_blocking(read, False)
        wake.wake()
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
    finally:
        os.close(read)
        os.close(write)


def test_calls_that_no_thread_has_begun_are_dropped() -> None:
    pool = HostPool(max_threads=1)
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()
    ran: list[int] = []

    def block() -> None:
        begun.set()
        release.wait(60)

    pool.submit(call(block), lambda _: ended.set())
    assert begun.wait(60)
    for number in range(5):
        pool.submit(call(ran.append, number), lambda _: None)
    pool.drop_queued()
    release.set()
    assert ended.wait(60)
    last = threading.Event()
    pool.submit(call(ran.append, 9), lambda _: last.set())
    assert last.wait(60)
    pool.close()
    assert ran == [9]


def test_an_idle_thread_keeps_nothing_of_its_last_call() -> None:
    class Argument:
        pass

    pool, ended = HostPool(), threading.Event()
    argument = Argument()
    alive = weakref.ref(argument)
    pool.submit(call(lambda _: None, argument), lambda _: ended.set())
    assert ended.wait(60)
    del argument
    pool.submit(call(lambda: None), lambda _: None)
    for _ in range(100):
        gc.collect()
        if alive() is None:
            break
        threading.Event().wait(0.01)
    pool.close()
    assert alive() is None


def test_a_process_without_threads_fails_the_call_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HostPool()
    outcomes: list[Outcome] = []

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        pool.submit(call(lambda: 1), outcomes.append)
    assert outcomes == [CallFailed("HostCallError", "f failed")]
    done = threading.Event()
    pool.submit(call(lambda: 1), lambda _: done.set())
    assert done.wait(60)
    pool.close()
