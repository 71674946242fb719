"""Host calls and an event loop for a guest with one thread and no sockets.

A plain host call suspends the guest until its answer is there. An awaited one only joins the queue: when the event loop
has nothing else to do, everything queued goes out in one suspension, so that ``asyncio.gather`` runs in parallel on the
host, and each answer wakes the coroutine that waits for it.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
import time
import warnings
from collections.abc import Callable
from typing import Any

from .host_calls import CallsHost, HostCalls
from .proxies import AsyncCalls

__all__ = ("GuestLoop", "LoopCalls", "install")


class LoopCalls(AsyncCalls):
    """Awaited host calls of a guest without threads."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: HostCalls | None = None
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []

    @property
    def waiting(self) -> bool:
        """Whether a coroutine waits for the host."""
        return bool(self._waiting)

    async def call(self, calls: CallsHost, handle: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `AsyncCalls.call`."""
        assert isinstance(calls, HostCalls)
        self._calls = calls
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((calls.submit(handle, None, args, kwargs), future))
        return await future

    def exchange(self, *, more: bool) -> None:
        """Let the host have the turn, then wake whoever was answered. ``more``: it must come back soon."""
        if self._calls is not None and not self.wake():
            self._calls.exchange_queued(more=more)
            self.wake()

    def wake(self) -> bool:
        """Hand out the answers that are there; whether there were any."""
        done = [pair for pair in self._waiting if pair[0].done]
        self._waiting = [pair for pair in self._waiting if not pair[0].done and not pair[1].done()]
        for call, future in done:
            if future.done():
                continue
            if call.error is not None:
                future.set_exception(call.error)
            else:
                future.set_result(call.answer)
        return bool(done)

    def end_cell(self) -> None:
        """Forget what nobody waits for any more."""
        self._waiting.clear()


class GuestLoop(asyncio.base_events.BaseEventLoop):
    """An event loop whose only source of events is the host."""

    def __init__(self, calls: LoopCalls) -> None:
        super().__init__()
        self._calls = calls
        self._selector = self

    def select(self, timeout: float | None) -> list[Any]:
        """Wait for what comes first: a host call's answer, or the time. What `BaseEventLoop` asks its selector."""
        if self._calls.waiting:
            self._calls.exchange(more=timeout is not None)
        elif timeout is None:
            raise RuntimeError("this would wait for ever: nothing is scheduled, and no host call is under way")
        elif timeout > 0:
            time.sleep(timeout)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are no file events."""

    def _write_to_self(self) -> None:
        """There is no other thread to wake this one."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Run ``func`` at once: there are no threads, so that ``asyncio.to_thread`` works, one call after another."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # noqa: BLE001 - whatever it raises is for the one who awaits it
            future.set_exception(exc)
        return future


def install(calls: LoopCalls) -> None:
    """Make every new event loop of this interpreter a `GuestLoop`, those of ``asyncio.run`` included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)

        class Policy(asyncio.DefaultEventLoopPolicy):
            def new_event_loop(self) -> asyncio.AbstractEventLoop:
                return GuestLoop(calls)

        asyncio.set_event_loop_policy(Policy())
