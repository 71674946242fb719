"""The event loop on which model calls run, in a thread of its own, so that any of them can be given up at any point.

A blocking call cannot: its time-outs are for one read each, and a server that sends a byte now and then never meets one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..waiting import piece

__all__ = ("run_in_background", "schedule")

_T = TypeVar("_T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0


def _running_loop() -> asyncio.AbstractEventLoop:
    """This process's loop, started if there is none. A forked child has the object and not the thread: it makes its own."""
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            # Daemon: a call under way must not hold up the end of the process.
            threading.Thread(target=_loop.run_forever, name="rlm-sandbox-models", daemon=True).start()
        return _loop


def _after_fork() -> None:
    """The parent's other threads may have held the lock; they are not here to give it back."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_in_background(work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for ``work`` on the loop. An exception here (Ctrl-C) cancels it, and with it its connection."""
    future = asyncio.run_coroutine_threadsafe(work, _running_loop())
    try:
        while not concurrent.futures.wait([future], piece(None)).done:
            continue
        return future.result()
    except BaseException:
        future.cancel()
        raise


def schedule(work: Coroutine[Any, Any, Any]) -> None:
    """Start ``work`` on the loop and do not wait for it."""
    asyncio.run_coroutine_threadsafe(work, _running_loop())
