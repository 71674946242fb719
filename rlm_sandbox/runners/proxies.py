"""What a guest sees of host functions and objects: every operation becomes one host call.

The allow-list is the host's and is checked there; here it only shapes the proxy, so that ``dir`` and errors are honest.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..wire.codec import HandleRef
from .host_calls import CallsHost

__all__ = ("AsyncCalls", "make_async_function", "make_function", "make_object")

#: Coroutines of one cell that call the host at once; each waits in a thread of its own.
_ASYNC_THREADS: Final = 48


class AsyncCalls:
    """Threads in which awaited host calls wait. Made anew in each cell that needs it: threads do not survive a fork."""

    def __init__(self) -> None:
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None

    def executor(self) -> concurrent.futures.ThreadPoolExecutor:
        """The present cell's threads."""
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(_ASYNC_THREADS, "host-call")
        return self._executor

    async def call(self, calls: CallsHost, handle: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the host and await the answer."""
        return await asyncio.get_running_loop().run_in_executor(self.executor(), lambda: calls.call(handle, None, args, kwargs))

    def end_cell(self) -> None:
        """Let the threads go; a later cell makes new ones."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def after_fork(self) -> None:
        """In a new process the threads are gone."""
        self._executor = None


def make_function(calls: CallsHost, handle: int, name: str) -> Callable[..., Any]:
    """A plain function that calls the host."""

    def host_function(*args: Any, **kwargs: Any) -> Any:
        return calls.call(handle, None, args, kwargs)

    return _named(host_function, name)


def make_async_function(calls: CallsHost, awaited: AsyncCalls, handle: int, name: str) -> Callable[..., Any]:
    """A coroutine function that calls the host; many can be awaited at once."""

    async def host_function(*args: Any, **kwargs: Any) -> Any:
        return await awaited.call(calls, handle, args, kwargs)

    return _named(host_function, name)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    function.__module__ = "host"
    function.__doc__ = f"{name}: a function of the host."
    return function


def _method(calls: CallsHost, handle: int, name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return calls.call(handle, name, args, kwargs)

    return _named(method, name)


def _attribute(calls: CallsHost, handle: int, name: str) -> property:
    return property(lambda self: calls.call(handle, f".{name}", (), {}))


def _operators(calls: CallsHost, handle: int, names: tuple[str, ...]) -> dict[str, Any]:
    def ask(name: str, *args: Any) -> Any:
        return calls.call(handle, f"#{name}", args, {})

    def iterate(self: Any) -> Iterator[Any]:
        return iter(ask("iter"))

    def item(self: Any, key: Any) -> Any:
        # A slice is not plain data; a context answers slices through its method.
        if isinstance(key, slice):
            return calls.call(handle, "slice", key.indices(ask("len"))[:2], {})
        return ask("getitem", key)

    table: dict[str, tuple[str, Any]] = {
        "bool": ("__bool__", lambda self: ask("bool")),
        "contains": ("__contains__", lambda self, part: ask("contains", part)),
        "eq": ("__eq__", lambda self, other: ask("eq", other)),
        "getitem": ("__getitem__", item),
        "iter": ("__iter__", iterate),
        "len": ("__len__", lambda self: ask("len")),
        "str": ("__str__", lambda self: ask("str")),
    }
    made = dict(table[name] for name in names if name in table)
    if "__eq__" in made:
        made["__hash__"] = None
    return made


def make_object(calls: CallsHost, reference: HandleRef) -> Any:
    """A proxy of an exposed host object, of a class made for it."""
    handle = reference.handle
    namespace: dict[str, Any] = {name: _method(calls, handle, name) for name in reference.methods}
    namespace.update((name, _attribute(calls, handle, name)) for name in reference.attributes)
    namespace.update(_operators(calls, handle, reference.operators))
    namespace.update(
        __slots__=(),
        __module__="host",
        __doc__="An object of the host: only what it exposes can be used.",
        __repr__=lambda self: f"<host object {reference.type_name}>",
    )
    return type(str(reference.type_name), (), namespace)()
