"""The messages of a session and the turn rules.

Strict turns: the host sends one *request*; the guest answers with any number of `Output` events and then exactly one
turn-ending event: `Done`, or `Suspend`: new host calls, each with an id. A suspended turn goes on with a `Resume` that answers
outstanding calls: one or more, or none to let other guest threads add theirs. Nothing may be sent out of turn: a guest that does is
killed. What the guest *prints* does not travel here on backends that capture its descriptors.

Values inside messages are trees of `codec`. A message is a JSON array: its name, then its fields in order. `SCHEMA` is
that list of fields; a test holds a snapshot of it, because any change asks one question: could an older peer misread this?
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, TypeVar

from .codec import WireError

__all__ = (
    "BindData", "BindObject", "BindText", "Configure", "Done", "Exec", "Forget", "Get", "Hello", "Message", "Names",
    "Output", "Protect", "ReadFile", "Resume", "SCHEMA", "SetValue", "Suspend", "dump_message", "load_message",
)  # fmt: skip

#: Texts of an error that cross in a header; longer ones are cut by the sender and refused by the receiver.
MAX_ERROR_CHARS: Final = 20_000
#: The failure's type name when a value to be read exceeds ``value_bytes``. The guest's word; the host's cap backs it.
TOO_LARGE: Final = "ValueTooLarge"
MAX_NAME_CHARS: Final = 200
MAX_CALLS_PER_SUSPENSION: Final = 1_024
#: Room in a frame for its header, names and error texts beside a value of ``value_bytes``.
FRAME_OVERHEAD: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages. ``op`` is its name on the wire."""

    op: ClassVar[str] = ""


# ---- requests: host to guest


@dataclass(frozen=True, slots=True)
class Configure(Message):
    """First request of a session: the guest-side share of the limits, and the source to run first."""

    op = "configure"
    output_bytes: int | None
    value_bytes: int | None
    setup: str


@dataclass(frozen=True, slots=True)
class Exec(Message):
    """Run a cell. ``number`` names it ``<cell N>``; ``read`` are names whose values come back in the same turn."""

    op = "exec"
    number: int
    code: str
    read: list[str]
    output_bytes: int | None


@dataclass(frozen=True, slots=True)
class Get(Message):
    """Answer with the value of one name."""

    op = "get"
    name: str


@dataclass(frozen=True, slots=True)
class SetValue(Message):
    """Give a name a plain value. ``tree`` is a codec tree."""

    op = "set"
    name: str
    tree: Any


@dataclass(frozen=True, slots=True)
class BindObject(Message):
    """Put a proxy under a name. ``kind``: ``function``, ``async`` or ``object``; the allow-list only shapes the proxy."""

    op = "bind"
    name: str
    handle: int
    kind: str
    type_name: str
    methods: list[str]
    attributes: list[str]
    operators: list[str]


@dataclass(frozen=True, slots=True)
class BindText(Message):
    """Map a context whose descriptor travels beside this frame. ``spans`` is a codec tree of bytes: document bounds, two native 64-bit numbers each.

    ``whole``: put the text itself under the name, not a context. ``meta`` is a codec tree.
    """

    op = "bind_text"
    name: str
    whole: bool
    chars: int
    width: int
    ascii_only: bool
    spans: Any
    meta: Any


@dataclass(frozen=True, slots=True)
class BindData(Message):
    """Map data whose descriptor travels beside this frame. ``kind``: ``bytes``, ``array`` or ``dataframe``.

    ``manifest`` is a codec tree of a dict: what is where in the ``size`` bytes.
    """

    op = "bind_data"
    name: str
    kind: str
    size: int
    manifest: Any


@dataclass(frozen=True, slots=True)
class Names(Message):
    """Answer with the session's variables: name to summary."""

    op = "names"


@dataclass(frozen=True, slots=True)
class ReadFile(Message):
    """Answer with at most ``size`` bytes of a regular file of the guest, from ``offset``; none at its end."""

    op = "read_file"
    path: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Protect(Message):
    """Make a standby now. Sent only after the supervisor holds a ticket; answered through the supervisor."""

    op = "protect"


@dataclass(frozen=True, slots=True)
class Resume(Message):
    """Answers to outstanding calls; each is ``[call id, value tree, null or [type, message]]``."""

    op = "resume"
    answers: list[list[Any]]


@dataclass(frozen=True, slots=True)
class Forget(Message):
    """No more calls will be answered in this cell: outstanding ones fail. Continues a suspended turn."""

    op = "forget"
    reason: str


# ---- events: guest to host


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """First event on a channel, before any request: the guest's protocol version and generation number."""

    op = "hello"
    version: int
    generation: int


@dataclass(frozen=True, slots=True)
class Output(Message):
    """Text printed, on backends whose guest has no descriptors of its own. ``text`` is a codec tree."""

    op = "output"
    stream: str
    text: Any


@dataclass(frozen=True, slots=True)
class Done(Message):
    """The request ended. ``value`` is a codec tree (for ``exec`` the echo, a text or null), ``read`` a codec tree of a dict.

    ``failure`` is null or ``[type name, message, traceback]``. ``unknown`` is true if ``get`` found no such name.
    ``names`` are the session's variables if they changed since they were last sent, else null.
    """

    op = "done"
    value: Any
    read: Any
    failure: list[str] | None
    unknown: bool
    names: list[str] | None


@dataclass(frozen=True, slots=True)
class Suspend(Message):
    """Host calls, each ``[id, handle, method, args tree, kwargs tree]``; ``method`` is null to call the handle itself, a
    method's name, ``.attribute`` or ``#operator``. Empty only while others are outstanding.

    ``more``: other guest threads run on and may have calls soon; the host gives the turn back for them, at growing
    intervals, with an empty `Resume`.
    """

    op = "suspend"
    calls: list[list[Any]]
    more: bool


_MESSAGES: Final[dict[str, type[Message]]] = {
    cls.op: cls
    for cls in (
        Configure,
        Exec,
        Get,
        SetValue,
        BindObject,
        BindText,
        BindData,
        Names,
        ReadFile,
        Protect,
        Resume,
        Forget,
        Hello,
        Output,
        Done,
        Suspend,
    )
}

_FIELDS: Final[dict[type[Message], tuple[tuple[str, str], ...]]] = {
    cls: tuple((field.name, str(field.type)) for field in fields(cls)) for cls in _MESSAGES.values()
}
#: Message name to its fields with their types, as text: the snapshot a test guards.
SCHEMA: Final[dict[str, list[str]]] = {
    op: [f"{field.name}: {field.type}" for field in fields(cls)] for op, cls in _MESSAGES.items()
}

_CHECKS: Final[dict[str, tuple[type, ...]]] = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
    "float | None": (float, int, type(None)),
    "list[str]": (list,),
    "list[str] | None": (list, type(None)),
    "list[list[Any]]": (list,),
}

#: Of each field the types it may have (None: a codec tree, which its decoder checks), and the type of its items if it is a list.
_SPECIFICATIONS: Final[dict[type[Message], tuple[tuple[tuple[type, ...] | None, type | None], ...]]] = {
    cls: tuple(
        (_CHECKS.get(kind), str if kind.startswith("list[str]") else list if kind == "list[list[Any]]" else None)
        for _, kind in specification
    )
    for cls, specification in _FIELDS.items()
}


def _values_of(names: tuple[str, ...]) -> Callable[[Message], tuple[Any, ...]]:
    """Reads the fields of a message, in C where there are several."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda message: tuple([getattr(message, name) for name in names])


_VALUES: Final = {cls: _values_of(tuple(name for name, _ in specification)) for cls, specification in _FIELDS.items()}

_M = TypeVar("_M", bound=Message)


def dump_message(message: Message) -> list[Any]:
    """The JSON header of a message."""
    return [message.op, *_VALUES[type(message)](message)]


def load_message(header: Any, expected: tuple[type[_M], ...]) -> _M:
    """The message of a decoded header, if it is one of ``expected``.

    Raises:
        WireError: it is not a well-formed message, or not one that may come now.
    """
    if type(header) is not list or not header or type(header[0]) is not str:
        raise WireError("a frame's header is not a message")
    cls = _MESSAGES.get(header[0])
    if cls is None or not issubclass(cls, expected):
        raise WireError("a message came that may not come now")
    specification = _SPECIFICATIONS[cls]
    if len(header) != len(specification) + 1:
        raise WireError("a message has the wrong number of fields")
    _, *values = header
    for (allowed, items), value in zip(specification, values, strict=True):
        if allowed is not None and type(value) not in allowed:
            raise WireError("a message has a field of the wrong type")
        if items is not None and value and not all(type(item) is items for item in value):
            raise WireError("a message has a field of the wrong type")
    return cls(*values)
