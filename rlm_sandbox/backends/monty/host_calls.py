"""`HostDoor`: the engine's names and object ids, mapped to handles, and outcomes, mapped to the engine's answers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from types import MethodType
from typing import Any, Final

import pydantic_monty as monty

from ...bridge.context_calls import CONTEXT_ERRORS, BoundContext
from ...bridge.handles import CallFailed, CallRefused, CallReturned, HandleTable, HostCall, Outcome
from ...context import Context
from ...wire.codec import HandleRef, ValueRefused
from . import values
from .cells import OPERATOR_METHODS, SLICE_METHOD

__all__ = ("HostDoor",)

_OPERATOR_OF: Final = {method: operator for operator, method in OPERATOR_METHODS.items()} | {SLICE_METHOD: "getitem"}
#: Exception classes the engine knows, by their name on the host.
_ENGINE_ERRORS: Final = {
    name: name
    for name in (
        "ArithmeticError", "AssertionError", "AttributeError", "Exception", "FileExistsError", "FileNotFoundError", "ImportError",
        "IndexError", "IsADirectoryError", "KeyError", "LookupError", "ModuleNotFoundError", "NameError", "NotADirectoryError",
        "NotImplementedError", "OSError", "OverflowError", "PermissionError", "RuntimeError", "StopIteration", "TimeoutError",
        "TypeError", "ValueError", "ZeroDivisionError",
    )
} | {"error": "re.PatternError", "PatternError": "re.PatternError"}  # fmt: skip
#: What the guest knows as HostCallError; this language subset has no exception classes of one's own.
_HOST_CALL_ERROR: Final = "RuntimeError"

Answer = dict[str, Any]


class HostDoor:
    """What one session's guest can reach on the host. Used by one thread at a time, like its `HandleTable`."""

    def __init__(self, value_bytes: int | None) -> None:
        self.table = HandleTable()
        #: Names bound to objects, with their operators: what `cells.read_cell` rewrites.
        self.operators: dict[str, tuple[str, ...]] = {}
        self._value_bytes = value_bytes
        self._functions: dict[str, tuple[int, str | None]] = {}
        self._objects: dict[uuid.UUID, HandleRef] = {}
        self._names: dict[str, tuple[int, str]] = {}
        self._contexts: dict[int, BoundContext] = {}
        self._classes: dict[str, monty.ClassType] = {}
        self._told: dict[str, str] = {}

    # ---- binding

    def bind(self, name: str, target: Any, inline: bool, errors: tuple[type[BaseException], ...]) -> Any:
        """Register ``target`` under ``name``; returns what the engine gets as its value.

        Raises:
            TypeError, ValueError: as of `HandleTable.add`.
        """
        context = None
        if isinstance(target, Context):
            context = BoundContext(target, self._value_bytes)
            kind, ref = self.table.add(name, context.exposed(), inline=inline, errors=(*CONTEXT_ERRORS, *errors))
            self._contexts[ref.handle] = context
        else:
            kind, ref = self.table.add(name, target, inline=inline, errors=errors)
        self.unbind(name)
        if kind == "object":
            self.operators[name] = ref.operators
            value = self._proxy(ref)
            self._names[name] = (ref.handle, "")
            return value
        value, key = self._function(f"<host function {name}>", ref.handle, None)
        self._names[name] = (ref.handle, key)
        return value

    def unbind(self, name: str) -> None:
        """Forget what ``name`` was bound to."""
        handle, key = self._names.pop(name, (0, ""))
        self.operators.pop(name, None)
        self._functions.pop(key, None)
        self._drop(handle)

    def clear(self) -> None:
        """Forget everything."""
        for name in list(self._names):
            self.unbind(name)
        self.forget_since(0)

    def copy(self) -> HostDoor:
        """A door to the same host objects under the same ids, for a copy of the interpreter's state."""
        door = HostDoor(self._value_bytes)
        door._contexts = {handle: context.copy() for handle, context in self._contexts.items()}
        door.table = self.table.copy(door._contexts)
        door.operators = dict(self.operators)
        door._functions = dict(self._functions)
        door._objects = dict(self._objects)
        door._names = dict(self._names)
        door._classes = dict(self._classes)
        return door

    def forget_since(self, mark: int) -> None:
        """Forget handles given out since ``mark``, of `HandleTable.mark`."""
        for ref in list(self._objects.values()):
            if ref.handle >= mark:
                self._drop(ref.handle)
        self.table.drop_since(mark)

    def _drop(self, handle: int) -> None:
        self.table.remove(handle)
        self._objects = {key: ref for key, ref in self._objects.items() if ref.handle != handle}
        self._functions = {key: pair for key, pair in self._functions.items() if pair[0] != handle}
        context = self._contexts.pop(handle, None)
        if context is not None:
            context.search.close()

    def cancel_searches(self) -> None:
        """End every running search of a context. From any thread."""
        for context in list(self._contexts.values()):
            context.search.cancel()

    def _function(self, shown: str, handle: int, method: str | None) -> tuple[Callable[[], None], str]:
        # The engine sends back the callable's name, and gives a guest's function to the host as its name: one that no
        # ordinary text looks like.
        key, count = shown, 1
        while key in self._functions and self._functions[key] != (handle, method):
            count += 1
            key = f"{shown[:-1]} {count}>"
        self._functions[key] = (handle, method)

        def stub() -> None:
            raise AssertionError("the engine calls host functions by snapshot only")

        stub.__name__ = key
        return stub, key

    def _proxy(self, ref: HandleRef) -> Any:
        known = self._classes.get(ref.type_name)
        if known is None:
            known = monty.ClassType(type(ref.type_name, (), {}), id=uuid.uuid4())
            self._classes[ref.type_name] = known
        # The host object itself never reaches the engine: a stand-in of the same class name does.
        instance = monty.ClassInstance(known.value(), class_type=known)
        self._objects[instance.id] = ref
        return instance

    # ---- from the guest

    def attribute(self, snapshot: monty.NameLookupSnapshot) -> HostCall | Any | None:
        """What reading an attribute of a host object means: a call to make, a method as a value, or nothing."""
        ref = self._objects.get(snapshot.object_id) if snapshot.object_id is not None else None
        if ref is None:
            return None
        name = snapshot.variable_name
        if name in ref.attributes:
            return self.table.resolve(ref.handle, f".{name}", (), {})
        if name in ref.methods:
            return self._function(f"<host method {ref.type_name}.{name}>", ref.handle, name)[0]
        return None

    def call(self, snapshot: monty.FunctionSnapshot) -> HostCall | Answer:
        """The host call a guest asks for, checked, or the engine's answer if it may not."""
        name = str(snapshot.function_name)
        if snapshot.object_id is not None:
            ref = self._objects.get(snapshot.object_id)
            if ref is None:
                return _raise("AttributeError", "there is no such host object")
            handle, method = ref.handle, name
            if name in _OPERATOR_OF:
                method = f"#{_OPERATOR_OF[name]}"
            elif name not in ref.methods:
                return _raise("AttributeError", f"{ref.type_name!r} object has no attribute {name[:100]!r}")
        else:
            found = self._functions.get(name)
            if found is None:
                return _raise("NameError", f"name {name[:200]!r} is not defined")
            handle, named = found
            method = named  # type: ignore[assignment]
        try:
            args = values.arguments(snapshot.args, self._value_bytes)
            kwargs = values.arguments(snapshot.kwargs, self._value_bytes)
            if name == SLICE_METHOD and len(args) == 3:
                args = (slice(*args),)
            return self.table.resolve(handle, method, args, kwargs)
        except (CallRefused, ValueRefused) as exc:
            return self._fail("HostCallError", str(exc))

    def is_search(self, call: HostCall) -> bool:
        """True for a regular expression over a context: it runs in a process of its own."""
        owner = _owner(call)
        return isinstance(owner, BoundContext) and owner.searches(getattr(call.function, "__name__", ""), dict(call.kwargs))

    @staticmethod
    def is_guest_work(call: HostCall) -> bool:
        """True for the context's own methods: what they take is the guest's time."""
        owner = call.args[0] if call.args and _owner(call) is None else _owner(call)
        return isinstance(owner, BoundContext)

    # ---- to the guest

    def answer(self, call: HostCall, outcome: Outcome) -> Answer:
        """The engine's answer for an outcome."""
        if isinstance(outcome, CallReturned):
            try:
                return {"return_value": values.to_guest(outcome.value, self._value_bytes, self.table.export, self._proxy)}
            except ValueRefused as exc:
                return self._fail("HostCallError", f"{call.name} returned what cannot cross: {exc}")
        assert isinstance(outcome, CallFailed)
        return self._fail(outcome.type_name, outcome.message)

    def _fail(self, type_name: str, message: str) -> Answer:
        message = message.encode("utf-8", "replace").decode()
        known = _ENGINE_ERRORS.get(type_name)
        if known is not None:
            return _raise(known, message)
        told = message if type_name == "HostCallError" else f"{type_name}: {message}"
        if len(self._told) > 1000:
            self._told.clear()
        self._told[f"{_HOST_CALL_ERROR}: {told}"] = f"{type_name}: {message}"
        return _raise(_HOST_CALL_ERROR, told)

    def own_words(self, error: str) -> str:
        """An uncaught error's text under the name the host's failure has."""
        return self._told.get(error, error)

    def value(self, value: Any) -> Any:
        """A host value for a guest's variable.

        Raises:
            ValueRefused: it cannot cross exactly.
        """
        return values.to_guest(value, self._value_bytes, None, self._proxy)


def _raise(exc_type: str, message: str) -> Answer:
    return {"exc_type": exc_type, "message": message}


def _owner(call: HostCall) -> Any:
    """The object of a method. Host objects are not asked for it, nor whether they are true: that may be code that raises."""
    return call.function.__self__ if type(call.function) is MethodType else None
