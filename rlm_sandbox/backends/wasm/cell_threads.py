"""Threads with a large stack, in which guests run: a guest's deep recursion must hit the engine's limit, not the host's.

And the host's signal handlers run in none of them. A Ctrl-C that raises inside a function the engine calls cannot go through
the engine, and one that raises while an engine's object is freed has it freed twice: both end the process.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from ...errors import BackendUnavailable
from ...waiting import take
from ._stack_unsafe import stack_bytes

__all__ = ("STACK_BYTES", "in_cell_thread", "run_in_cell_thread")

_T = TypeVar("_T")

#: Must exceed the engine's ``max_wasm_stack`` with room for the host functions a guest calls.
STACK_BYTES: Final = 64 << 20
#: What a C library may take of it for itself.
_ROUNDING_BYTES: Final = 1 << 20
#: How often a thread is started before it is given up that nobody else sets the size of stacks just then.
_ATTEMPTS: Final = 5
_IDLE_SECONDS: Final = 5.0

log: Final = logging.getLogger("rlm_sandbox.wasm")


class _CellThreads:
    """The threads of one process."""

    def __init__(self) -> None:
        #: Those that wait for a job. Taking one out is a single step, so that nobody needs a lock.
        self.idle: list[_CellThread] = []
        #: Taken again by the same thread if a collection, just then, frees a session.
        self.starting = threading.RLock()


class _CellThread:
    def __init__(self, siblings: _CellThreads) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        #: Whether the stack is as large as it was asked for, once it has been looked at.
        self.started: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._siblings = siblings

    def run(self) -> None:
        size = stack_bytes()
        large = size is None or size >= STACK_BYTES - _ROUNDING_BYTES
        self.started.put(large)
        idle = self._siblings.idle
        while large:
            try:
                job = self.jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                try:
                    idle.remove(self)
                    return
                except ValueError:
                    continue  # it was taken just now: its job is coming
            try:
                job()
            except Exception:  # the thread serves others
                log.exception("a job of a cell thread raised")
            del job
            idle.append(self)


#: By process: the threads of a process that forks do not exist in the other, and a lock they held is held for ever there.
_processes: Final[dict[int, _CellThreads]] = {}


def run_in_cell_thread(job: Callable[[], None]) -> None:
    """Start ``job``, which must not raise, in a thread of its own.

    Raises:
        BackendUnavailable: no thread with such a stack can be made.
    """
    process = os.getpid()
    threads = _processes.get(process) or _processes.setdefault(process, _CellThreads())
    try:
        thread = threads.idle.pop()
    except IndexError:
        thread = _started(threads)
    thread.jobs.put(job)


def in_cell_thread(work: Callable[[], _T]) -> _T:
    """What ``work`` returns or raises in such a thread. An interrupt of this one comes at once; ``work`` is done all the same.

    Raises:
        BackendUnavailable: no thread with such a stack can be made.
    """
    values: list[_T] = []
    failures: list[BaseException] = []
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def job() -> None:
        try:
            values.append(work())
        except BaseException as exc:  # noqa: BLE001 - it is raised where it is waited for
            failures.append(exc)
        ended.put(None)

    run_in_cell_thread(job)
    take(ended)
    if failures:
        raise failures.pop()
    return values.pop()


def _started(threads: _CellThreads) -> _CellThread:
    for _ in range(_ATTEMPTS):
        thread = _CellThread(threads)
        _start(thread, threads.starting)
        if take(thread.started):
            return thread
    raise BackendUnavailable(
        "wasm",
        f"threads do not get the stack of {STACK_BYTES >> 20} MiB that is asked for",
        "have no other thread call threading.stack_size() while sessions are used",
    )


def _start(thread: _CellThread, starting: threading.RLock) -> None:
    # The size is the process's for every thread started meanwhile; a larger stack costs those only address space. Whoever sets
    # another one meanwhile gives this thread a small stack, in which a guest's recursion would end the host: it looks itself.
    with starting:
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
