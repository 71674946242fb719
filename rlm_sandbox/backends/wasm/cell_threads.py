"""Threads with a large stack, in which guests run: a guest's deep recursion must hit the engine's limit, not the host's."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Final

from ...errors import BackendUnavailable

__all__ = ("STACK_BYTES", "run_in_cell_thread")

#: Must exceed the engine's ``max_wasm_stack`` with room for the host functions a guest calls.
STACK_BYTES: Final = 64 << 20
_IDLE_SECONDS: Final = 5.0

log: Final = logging.getLogger("rlm_sandbox.wasm")

_lock: Final = threading.Lock()
_idle: Final[list[_CellThread]] = []


class _CellThread:
    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            try:
                job = self.jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with _lock:
                    if self in _idle:
                        _idle.remove(self)
                        return
                continue  # it was taken just now: its job is coming
            try:
                job()
            except Exception:  # the thread serves others
                log.exception("a job of a cell thread raised")
            del job
            with _lock:
                _idle.append(self)


def run_in_cell_thread(job: Callable[[], None]) -> None:
    """Start ``job``, which must not raise, in a thread of its own.

    Raises:
        BackendUnavailable: no thread with such a stack can be made.
    """
    with _lock:
        thread = _idle.pop() if _idle else None
    if thread is None:
        thread = _CellThread()
        _start(thread)
    thread.jobs.put(job)


def _start(thread: _CellThread) -> None:
    # The size is the process's for every thread started meanwhile; a larger stack costs those only address space.
    with _lock:
        try:
            before = threading.stack_size(STACK_BYTES)
            try:
                threading.Thread(target=thread.run, name="rlm-sandbox-wasm-cell", daemon=True).start()
            finally:
                threading.stack_size(before)
        except (RuntimeError, ValueError) as exc:
            raise BackendUnavailable(
                "wasm",
                f"a thread with a stack of {STACK_BYTES >> 20} MiB cannot be started ({exc})",
                "raise ulimit -v and ulimit -u",
            ) from None
