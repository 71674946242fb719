"""Waits that Ctrl-C ends whenever it comes: also just before the wait begins, which a signal to another thread amounts to."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import queue
import threading
import time
from collections.abc import Callable

import pytest

from rlm_sandbox.adapters.background import run_in_background
from rlm_sandbox.waiting import PIECE_SECONDS, is_readable, piece, take, wait_until

from ..ctrl_c import unseen_ctrl_c

_LONG_SECONDS = 120.0


def test_waits_on_the_main_thread_are_made_in_pieces() -> None:
    assert piece(None) == piece(1_000.0) == PIECE_SECONDS
    assert (piece(0.0), piece(0.01)) == (0.0, 0.01)


def test_waits_elsewhere_are_made_at_once() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(piece, 1_000.0).result(60) == 1_000.0
        assert pool.submit(piece, None).result(60) is None


@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(lambda: wait_until(threading.Event().wait, _LONG_SECONDS), id="event"),
        pytest.param(lambda: wait_until(threading.Event().wait), id="event without end"),
        pytest.param(lambda: take(queue.SimpleQueue(), _LONG_SECONDS), id="queue"),
        pytest.param(lambda: take(queue.SimpleQueue()), id="queue without end"),
    ],
)
def test_ctrl_c_ends_a_wait(wait: Callable[[], object]) -> None:
    with unseen_ctrl_c() as press:
        press()
        wait()


def test_ctrl_c_ends_the_wait_for_a_descriptor() -> None:
    read, write = os.pipe()
    try:
        with unseen_ctrl_c() as press:
            press()
            is_readable(read, _LONG_SECONDS)
    finally:
        os.close(read)
        os.close(write)


def test_what_comes_after_the_first_piece_is_taken() -> None:
    items: queue.SimpleQueue[int] = queue.SimpleQueue()
    event = threading.Event()
    read, write = os.pipe()

    def later() -> None:
        items.put(7)
        event.set()
        os.write(write, b"x")

    timer = threading.Timer(PIECE_SECONDS * 1.5, later)
    timer.start()
    try:
        assert take(items, 60) == 7
        assert wait_until(event.wait, 60)
        assert is_readable(read, 60)
    finally:
        timer.join(60)
        os.close(read)
        os.close(write)


def test_a_wait_ends_in_time() -> None:
    read, write = os.pipe()
    seconds = PIECE_SECONDS * 1.5
    try:
        started = time.monotonic()
        with pytest.raises(queue.Empty):
            take(queue.SimpleQueue(), seconds)
        assert not wait_until(threading.Event().wait, seconds)
        assert not is_readable(read, seconds)
        assert not is_readable(read)
        assert time.monotonic() - started >= 3 * seconds - 0.01
    finally:
        os.close(read)
        os.close(write)


def test_ctrl_c_ends_the_wait_for_an_adapter() -> None:
    async def never() -> None:
        press()
        await asyncio.sleep(_LONG_SECONDS)

    with unseen_ctrl_c() as press:
        run_in_background(never())
