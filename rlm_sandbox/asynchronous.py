"""`AsyncREPL`: any session for code that runs in an event loop. The calls are the session's own, made on a thread of its own."""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

from .errors import SessionBusy, SessionClosed
from .limits import Limits
from .options import BackendOptions
from .pool import SessionPool
from .protocol import Capabilities, Grade, REPLProtocol, SupportsCheckpoint, SupportsFork, SupportsReadFile
from .registry import open_repl
from .results import ExecResult, OutputChunk

if TYPE_CHECKING:
    import asyncio

# asyncio is imported where it is used: whoever calls these has it, and ``import rlm_sandbox`` stays quick for the others.

__all__ = ("AsyncREPL",)

#: A cancelled call is interrupted again after this long: the first time it may not have begun.
_AGAIN_SECONDS: Final = 0.02

T = TypeVar("T")


class AsyncREPL:
    """A sandboxed Python REPL in an event loop: the names of `REPLProtocol`, awaited.

    ```python
    async with await AsyncREPL.open("jail") as repl:
        result = await repl.exec("1 + 1")
    ```

    One call at a time: a second one raises `SessionBusy`; only `interrupt` and `close` may come concurrently. A call that is
    cancelled interrupts what runs in the guest, which is killed if it does not end, waits until that is over (within the
    grace of 0.25 s and the 2 s of a recovery), and only then raises `asyncio.CancelledError`: the session is usable, with
    the cell's names as at the interrupt or as before it.

    An ``async def`` that is bound runs in the event loop that called `bind`, other functions on the session's threads.
    Not thread-safe: it belongs to one event loop at a time.
    """

    def __init__(self, repl: REPLProtocol) -> None:
        """
        Args:
            repl: an open session of any backend, or of a pool. It is closed with this one, and not to be used beside it.
        """
        self._repl = repl
        self._lane = _Lane()
        self._busy = False
        self._closed = False
        self._finalizer = weakref.finalize(self, self._lane.stop)

    @classmethod
    async def open(
        cls,
        name: str = "auto",
        *,
        limits: Limits | None = None,
        accept: Grade = Grade.HARD,
        trusted: bool = False,
        setup: str = "",
        files: Mapping[str, Any] | tuple[()] = (),
        packages: tuple[str, ...] = (),
        recovery: bool = True,
        options: BackendOptions | None = None,
    ) -> Self:
        """Open a session: the arguments and errors of `open_repl`."""
        return await cls._opened(
            lambda: open_repl(
                name, limits=limits, accept=accept, trusted=trusted, setup=setup, files=files,
                packages=packages, recovery=recovery, options=options,
            )
        )  # fmt: skip

    @classmethod
    async def from_pool(cls, pool: SessionPool, timeout_seconds: float | Literal["pool"] | None = "pool") -> Self:
        """A session of a pool: the arguments and errors of `SessionPool.open_repl`."""
        return await cls._opened(lambda: pool.open_repl(timeout_seconds))

    @classmethod
    async def _opened(cls, get: Callable[[], REPLProtocol]) -> Self:
        import asyncio

        opening = _in_thread(get)
        try:
            return cls(await asyncio.shield(asyncio.wrap_future(opening)))
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)
            raise

    @property
    def capabilities(self) -> Capabilities:
        """See `REPLProtocol`."""
        return self._repl.capabilities

    @property
    def limits(self) -> Limits:
        """The session's limits."""
        return self._repl.limits

    async def exec(
        self,
        code: str,
        *,
        limits: Limits | None = None,
        read: tuple[str, ...] = (),
        on_output: Callable[[OutputChunk], None] | None = None,
    ) -> ExecResult:
        """See `REPLProtocol.exec`. ``on_output`` is called in the event loop."""
        import asyncio

        listen = None if on_output is None else _heard_in_loop(on_output, asyncio.get_running_loop())
        return await self._call(lambda: self._repl.exec(code, limits=limits, read=read, on_output=listen))

    async def get(self, name: str, default: Any = None) -> Any:
        """See `REPLProtocol.get`."""
        return await self._call(lambda: self._repl.get(name, default))

    async def set(self, name: str, value: Any) -> None:
        """See `REPLProtocol.set`."""
        await self._call(lambda: self._repl.set(name, value))

    async def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """See `REPLProtocol.bind`. With ``inline`` a function runs on the session's own thread, never in the event loop."""
        import asyncio

        if inspect.iscoroutinefunction(target) and not inline:
            target = _in_loop(target, asyncio.get_running_loop())
        await self._call(lambda: self._repl.bind(name, target, inline=inline, errors=errors))

    async def names(self) -> dict[str, str]:
        """See `REPLProtocol.names`."""
        return await self._call(self._repl.names)

    def interrupt(self) -> None:
        """See `REPLProtocol.interrupt`. Not awaited: it returns at once."""
        self._repl.interrupt()

    async def reset(self) -> None:
        """See `REPLProtocol.reset`."""
        await self._call(self._repl.reset)

    async def fork(self) -> Self:
        """See `SupportsFork.fork`. Raises NotImplementedError where ``capabilities.fork`` is False."""
        repl = self._repl
        if not isinstance(repl, SupportsFork):
            raise self._lacks("fork()")
        return type(self)(await self._call(repl.fork))

    async def checkpoint(self) -> str:
        """See `SupportsCheckpoint.checkpoint`. Raises NotImplementedError where the backend has none."""
        if not isinstance(self._repl, SupportsCheckpoint):
            raise self._lacks("checkpoint()")
        return await self._call(self._repl.checkpoint)

    async def restore(self, checkpoint: str) -> None:
        """See `SupportsCheckpoint.restore`. Raises NotImplementedError where the backend has none."""
        repl = self._repl
        if not isinstance(repl, SupportsCheckpoint):
            raise self._lacks("restore()")
        await self._call(lambda: repl.restore(checkpoint))

    async def read_file(self, name: str) -> bytes:
        """See `SupportsReadFile.read_file`. Raises NotImplementedError where the backend has none."""
        repl = self._repl
        if not isinstance(repl, SupportsReadFile):
            raise self._lacks("read_file()")
        return await self._call(lambda: repl.read_file(name))

    def _lacks(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"sessions of backend {self.capabilities.backend!r} have no {what}; choose another backend")

    async def close(self) -> None:
        """See `REPLProtocol.close`. Not given up when it is cancelled."""
        if self._closed:
            return
        self._closed = True
        await _to_the_end(_in_thread(self._repl.close), lambda: None)
        self._finalizer()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, function: Callable[[], T]) -> T:
        if self._closed:
            raise SessionClosed("the session was closed; open a new one")
        if self._busy:
            raise SessionBusy("the session is running another call; wait for it, or use one session per task")
        self._busy = True
        try:
            return await _to_the_end(self._lane.submit(function), self._repl.interrupt)
        finally:
            self._busy = False


async def _to_the_end(running: concurrent.futures.Future[T], interrupt: Callable[[], None]) -> T:
    """The outcome of what runs on a thread. A cancellation interrupts it, and is raised when it has ended."""
    import asyncio

    waiting = asyncio.wrap_future(running)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError as exc:
        cancelled = exc
    while not waiting.done():
        interrupt()
        try:
            await asyncio.wait([waiting], timeout=_AGAIN_SECONDS)
        except asyncio.CancelledError:
            continue
    if not waiting.cancelled():
        waiting.exception()  # looked at: nobody else will
    raise cancelled


def _heard_in_loop(on_output: Callable[[OutputChunk], None], loop: asyncio.AbstractEventLoop) -> Callable[[OutputChunk], None]:
    def heard(chunk: OutputChunk) -> None:
        loop.call_soon_threadsafe(on_output, chunk)

    return heard


def _in_loop(function: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> Callable[..., Any]:
    """``function``, whose calls run in ``loop`` wherever they are awaited."""
    import asyncio

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(function(*args, **kwargs), loop))

    return call


def _close_unwanted(opening: concurrent.futures.Future[REPLProtocol]) -> None:
    """On the thread that opened it: nobody waits for the session any more."""
    if opening.exception() is None:
        opening.result().close()


def _run(job: Callable[[], T], context: contextvars.Context, future: concurrent.futures.Future[T]) -> None:
    try:
        result = context.run(job)
    except BaseException as exc:  # noqa: BLE001 - it is raised where it is awaited
        future.set_exception(exc)
    else:
        future.set_result(result)


def _in_thread(job: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Run ``job`` on a thread of its own. A daemon: it never holds up the end of the program."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    arguments = (job, contextvars.copy_context(), future)
    threading.Thread(target=_run, args=arguments, name="rlm-sandbox-async-open", daemon=True).start()
    return future


class _Lane:
    """One thread, from the first job to `stop`. The loop's own executor has few threads, and 200 sessions may wait at once."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], contextvars.Context, concurrent.futures.Future[Any]] | None] = (
            SimpleQueue()
        )
        self._started = False

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``job`` after those before it."""
        if not self._started:
            threading.Thread(target=_serve, args=(self._jobs,), name="rlm-sandbox-async", daemon=True).start()
            self._started = True
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._jobs.put((job, contextvars.copy_context(), future))
        return future

    def stop(self) -> None:
        """End the thread when its jobs are done."""
        self._jobs.put(None)


def _serve(jobs: SimpleQueue[tuple[Callable[[], Any], contextvars.Context, concurrent.futures.Future[Any]] | None]) -> None:
    while (job := jobs.get()) is not None:
        _run(*job)
        del job  # an idle thread would keep the session alive
