"""`Door`: what a restricted cell reaches of the host: functions and objects by handle, a context by its own methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from ...bridge.handles import CallFailed, CallRefused, CallReturned, HandleTable, HostCall, Outcome, plain_copy
from ...context import CONTEXT_METHODS, Context, WholeText
from ...runners.host_calls import HostCallError, guest_exception
from ...runners.proxies import make_function, make_object
from ...wire.codec import HandleRef, ValueRefused

__all__ = ("Door",)

_PLAIN: Final = (bool, int, str, type(None))


class Door:
    """The host's side of one session's bindings. ``run`` runs a checked call within the present cell."""

    def __init__(self, run: Callable[[HostCall], Outcome], value_bytes: int | None) -> None:
        self.table = HandleTable()
        self._run = run
        self._value_bytes = value_bytes

    def bind(self, name: str, target: Any, inline: bool, errors: tuple[type[BaseException], ...]) -> Any:
        """What the cell finds under ``name``.

        Raises:
            TypeError, ValueError: as of `HandleTable.add`.
        """
        if isinstance(target, WholeText):
            return target.context.text
        if isinstance(target, Context):
            return make_context(target)
        kind, reference = self.table.add(name, target, inline=inline, errors=errors)
        return make_object(self, reference) if kind == "object" else make_function(self, reference.handle, name)

    def call(self, handle: int, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the guest's, from its proxy. An ``async def`` is called like any other function.

        Raises:
            TypeError: an argument is not plain data, or too large.
            HostCallError, or an exception the host allows: the call failed.
        """
        try:
            plain_args = plain_copy(list(args), max_bytes=self._value_bytes)
            plain_kwargs = plain_copy(dict(kwargs), max_bytes=self._value_bytes)
        except ValueRefused as exc:
            problem: BaseException = TypeError(f"arguments of a host call must be plain data: {exc}")
        else:
            try:
                call = self.table.resolve(handle, method, plain_args, plain_kwargs)
            except CallRefused as exc:
                problem = HostCallError(str(exc))
            else:
                answer = self._answer(call, self._run(call))
                if not isinstance(answer, _Failure):
                    return answer.value
                problem = answer.problem
        raise problem  # here, so that no exception of the host hangs on it

    def _answer(self, call: HostCall, outcome: Outcome) -> _Value | _Failure:
        if isinstance(outcome, CallFailed):
            return _Failure(guest_exception(outcome.type_name, outcome.message))
        assert isinstance(outcome, CallReturned)
        mark = self.table.mark()
        try:
            return _Value(self._proxies(plain_copy(outcome.value, max_bytes=self._value_bytes, fallback=self.table.export)))
        except Exception as exc:  # noqa: BLE001 - foreign classes raise what they like
            self.table.drop_since(mark)
            why = f": {exc}" if isinstance(exc, ValueRefused) else ""
            return _Failure(HostCallError(f"{call.name} returned a value that cannot be sent{why}"))

    def _proxies(self, value: Any) -> Any:
        if type(value) is HandleRef:
            return make_object(self, value)
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self._proxies(item) for item in value)
        if type(value) is dict:
            return {key: self._proxies(item) for key, item in value.items()}
        return value


class _Value:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _Failure:
    __slots__ = ("problem",)

    def __init__(self, problem: BaseException) -> None:
        self.problem = problem


def make_context(context: Context) -> Any:
    """A context as a cell sees it: its methods run at once, on the cell's own clock. Nothing of the object can be changed."""

    def method(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if type(value) not in _PLAIN:
                    raise TypeError(f"ctx.{name}() takes plain text and numbers, not {type(value).__name__}")
            found = getattr(context, name)(*args, **kwargs)
            return plain_copy(found, max_bytes=None) if name == "metadata" else found

        call.__name__ = call.__qualname__ = name
        call.__doc__ = getattr(Context, name).__doc__
        return call

    def iterate(self: Any) -> Iterator[str]:
        return iter([context.get_document(index) for index in range(context.num_documents())])

    namespace: dict[str, Any] = {name: method(name) for name in CONTEXT_METHODS}
    namespace.update(
        __slots__=(),
        __module__="host",
        __len__=lambda self: len(context),
        __bool__=lambda self: bool(context),
        __getitem__=lambda self, key: context[key],
        __contains__=lambda self, part: part in context,
        __iter__=iterate,
        __repr__=lambda self: repr(context),
    )
    return type("Context", (), namespace)()
