"""`Bindings`: the names a session has bound, and what of the host stands behind each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...bridge.arguments import sendable
from ...bridge.names import checked_name
from ...context import Context, WholeText
from ...errors import LimitExceeded
from ...wire.codec import ValueRefused
from . import values
from .host_calls import HostDoor
from .interpreter import Origin
from .turn import TurnStopped

__all__ = ("Bindings", "Bound", "Moment", "check_free")


@dataclass(frozen=True, slots=True)
class Bound:
    """What `bind` was given."""

    target: Any
    inline: bool
    errors: tuple[type[BaseException], ...]


def check_free(name: str) -> None:
    """Refuse names the machinery uses.

    Raises:
        TypeError, ValueError: it is none, or reserved.
    """
    if checked_name(name).startswith("_rlm"):
        raise ValueError(f"{name!r} is reserved; choose another name")


class Bindings:
    """Used by one thread at a time, like its door."""

    def __init__(self, value_bytes: int | None) -> None:
        self._value_bytes = value_bytes
        self.door = HostDoor(value_bytes)
        self._bound: dict[str, Bound] = {}
        self._texts: dict[str, Context] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._bound

    def items(self) -> list[tuple[str, Bound]]:
        """Names with what was bound to them, for a fresh interpreter."""
        return list(self._bound.items())

    def sendable(self, name: str, value: Any) -> Any:
        """A plain value as the engine takes it, for a variable.

        Raises:
            TypeError: it has to be bound.
            UnsendableValue: it cannot cross exactly.
        """
        return sendable(name, value, self.door.value)

    def check_text(self, target: Any) -> None:
        """Refuse a whole text that has to cross now and cannot.

        Raises:
            LimitExceeded: it is too large.
        """
        if isinstance(target, WholeText):
            try:
                self.text_of(target.context)
            except TurnStopped as exc:
                raise LimitExceeded("value_bytes", float(self._value_bytes or 0), exc.observed) from None

    def value(self, name: str, bound: Bound, *, fresh: bool) -> Any | None:
        """Put a host object behind ``name`` and return what its variable gets.

        None if it gets nothing: it is ``fresh``, has no value in the guest, and a whole text comes on its first use.

        Raises:
            TypeError, ValueError: it cannot be bound.
            TurnStopped: it is a text too large to cross.
        """
        if isinstance(bound.target, WholeText):
            self.door.unbind(name)
            self._texts[name] = bound.target.context
            return None if fresh else self.text_of(bound.target.context)
        found = self.door.bind(name, bound.target, bound.inline, bound.errors)
        self._texts.pop(name, None)
        return found

    def keep(self, name: str, bound: Bound) -> None:
        """The binding holds: a fresh interpreter gets it too."""
        self._bound[name] = bound

    def drop(self, name: str) -> None:
        """The guest's variable is an ordinary one now."""
        self._bound.pop(name, None)
        self._texts.pop(name, None)
        self.door.unbind(name)

    def context(self, name: str) -> Context | None:
        """The context whose whole text ``name`` is."""
        return self._texts.get(name)

    def text(self, name: str) -> str | None:
        """The text that ``name`` stands for, None if it does not.

        Raises:
            TurnStopped: as of `text_of`.
        """
        context = self._texts.get(name)
        return None if context is None else self.text_of(context)

    def text_of(self, context: Context) -> str:
        """A context's whole text for the guest.

        Raises:
            TurnStopped: it is larger than ``value_bytes``, or than a frame, or has lone surrogates.
        """
        limit = min(self._value_bytes or values.MAX_FRAME_BYTES, values.MAX_FRAME_BYTES)
        if len(context) > limit:
            raise TurnStopped("value_bytes", len(context))
        try:
            sent = self.door.value(context.text)
        except ValueRefused:
            raise TurnStopped("value_bytes", len(context)) from None
        assert isinstance(sent, str)
        return sent

    def copy(self) -> Bindings:
        """The same host objects, for a copy of the interpreter's state."""
        copied = Bindings(self._value_bytes)
        copied.door = self.door.copy()
        copied._bound = dict(self._bound)
        copied._texts = dict(self._texts)
        return copied

    def clear(self) -> None:
        """Forget everything."""
        self.door.clear()
        self._bound.clear()
        self._texts.clear()


@dataclass(frozen=True, slots=True)
class Moment:
    """A session's state: of its interpreter, and what it can reach on the host."""

    interpreter: Origin
    bindings: Bindings
