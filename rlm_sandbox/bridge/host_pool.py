"""`HostPool`: where host functions run, so that ``exec`` can return at the wall limit even if one never does."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import threading
from collections.abc import Callable, Coroutine
from queue import Empty, SimpleQueue
from typing import Any, Final

from .handles import CallReturned, HostCall, Outcome, failure, run_call

__all__ = ("HostPool",)

#: Host functions of one session running at once; more wait. A batch of 32 model calls must not queue.
MAX_THREADS: Final = 64
#: An idle thread ends after this many seconds.
IDLE_SECONDS: Final = 5.0
#: How long a cancelled ``async def`` may clean up after `close`, in the background.
CANCEL_SECONDS: Final = 1.0

_Work = tuple[contextvars.Context, HostCall, Callable[[Outcome], None]]


class HostPool:
    """Daemon threads started on demand, and one event loop for ``async def`` functions.

    `concurrent.futures` is not used because its threads are joined when the process ends: one host function that
    never returns would hold up the exit of the whole program.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._lock = threading.Lock()
        #: Calls for which there is no thread.
        self._queue: collections.deque[_Work] = collections.deque()
        #: The inboxes of waiting threads. A call goes straight into one: a condition that all of them wait on costs a
        #: switch of threads more.
        self._idle: list[SimpleQueue[_Work | None]] = []
        self._threads = 0
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        #: The event loop itself holds only weak references. Touched on its thread only.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tasks_given = 0

    def submit(self, call: HostCall, on_done: Callable[[Outcome], None]) -> None:
        """Start ``call``; ``on_done`` gets its outcome on a pool thread, once. After `close` nothing is started."""
        context = contextvars.copy_context()
        if call.is_async:
            self._submit_async(context, call, on_done)
            return
        work = (context, call, on_done)
        with self._lock:
            if self._closed:
                return
            if self._idle:
                self._idle.pop().put(work)
                return
            if self._threads >= self._max_threads:
                self._queue.append(work)
                return
            self._threads += 1
        try:
            threading.Thread(target=self._run, args=([work],), name="rlm-sandbox-host-call", daemon=True).start()
        except RuntimeError as exc:  # the process has no threads left; a call that waits for one that runs is no error
            with self._lock:
                self._threads -= 1
                if self._idle:
                    self._idle.pop().put(work)
                    return
                if self._threads:
                    self._queue.append(work)
                    return
            on_done(failure(call, exc))

    def drop_queued(self) -> None:
        """Forget the calls that no thread has begun and cancel those of ``async def`` functions: their cell has ended, and what
        they would cost is wasted. A function that a thread runs cannot be ended; its answer is refused."""
        with self._lock:
            self._queue.clear()
            if self._loop is not None and self._tasks_given:
                self._tasks_given = 0
                # What is submitted later is started later, so this cancels no call of a later cell.
                self._loop.call_soon_threadsafe(_cancel, self._tasks)

    def close(self) -> None:
        """Let idle threads end and start nothing more. Running functions are left to themselves."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            for inbox in self._idle:
                inbox.put(None)
            self._idle.clear()
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)

    def _run(self, first: list[_Work]) -> None:
        inbox: SimpleQueue[_Work | None] = SimpleQueue()
        work: _Work | None = first.pop()
        while work is not None:
            context, call, on_done = work
            outcome = context.run(run_call, call)
            # An idle thread would keep the arguments and the session alive.
            work = context = call = None  # type: ignore[assignment]
            with self._lock:
                if self._queue:
                    work = self._queue.popleft()
                elif self._closed:
                    inbox.put(None)
                else:
                    self._idle.append(inbox)
            # The last thing before waiting: the thread it wakes needs the interpreter's lock at once.
            on_done(outcome)
            del on_done, outcome
            if work is None:
                work = self._wait(inbox)
        with self._lock:
            self._threads -= 1

    def _wait(self, inbox: SimpleQueue[_Work | None]) -> _Work | None:
        try:
            return inbox.get(timeout=IDLE_SECONDS)
        except Empty:
            with self._lock:
                if inbox in self._idle:
                    self._idle.remove(inbox)
                    return None
            return inbox.get()  # something was put there at the last moment

    def _submit_async(self, context: contextvars.Context, call: HostCall, on_done: Callable[[Outcome], None]) -> None:
        async def run() -> None:
            try:
                outcome: Outcome = CallReturned(await call.function(*call.args, **call.kwargs))
            except BaseException as exc:  # noqa: BLE001 - whatever a host function raises is its outcome
                outcome = failure(call, exc)
            on_done(outcome)

        with self._lock:
            if self._closed:
                return
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(self._loop,), name="rlm-sandbox-host-loop", daemon=True).start()
            # Under the lock, so that it comes before the stop of a `close` on another thread.
            self._tasks_given += 1
            self._loop.call_soon_threadsafe(_start, self._loop, run(), context, self._tasks)


def _start(
    loop: asyncio.AbstractEventLoop,
    running: Coroutine[Any, Any, None],
    context: contextvars.Context,
    tasks: set[asyncio.Task[Any]],
) -> None:
    task = loop.create_task(running, context=context)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in list(tasks):
        task.cancel()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:  # a task may take a moment to clean up; one that refuses to end is left to itself
            loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_SECONDS))
        loop.close()
