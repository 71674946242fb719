"""The whole of the outside world that a guest can reach: clocks, random numbers, sleep, and its own four functions.

No environment, no files, no sockets: what is not defined here traps, and a trap costs the guest its instance. Every value
goes through the guest's `Peer`, which records it, so that a replay is told the same. Only `poll` takes a list, and refuses a long one.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, NoReturn

from wasmtime import Engine, WasmtimeError
from wasmtime.component import Component, Linker, ResourceHost, ResourceType

from .peer import Peer, Stopped

__all__ = ("Surroundings", "linker")

_VERSION: Final = "@0.2.9"
_POLLABLE: Final = 1
#: One call's random bytes: the engine converts them one by one. The C library of the guest asks for 256 at most.
_MAX_RANDOM: Final = 4096
#: Live timers of one instance; the interpreter makes one at a time.
_MAX_POLLABLES: Final = 1024
#: The clock of the guests starts with this process: it tells nothing about the machine.
_STARTED: Final = time.monotonic_ns()


class Surroundings:
    """What one instance's imports need: whom they reach, and the instance's timers."""

    __slots__ = ("last_pollable", "peer", "pollables")

    def __init__(self) -> None:
        self.peer: Peer | None = None
        self.pollables: dict[int, int] = {}
        self.last_pollable = 0

    def must_stop(self) -> bool:
        """Whether the guest that runs now must end; there is no peer while an instance is made."""
        peer = self.peer
        return peer is not None and peer.must_stop

    def new_pollable(self, when: int) -> int:
        """A timer's number."""
        if len(self.pollables) >= _MAX_POLLABLES:
            raise Stopped
        self.last_pollable += 1
        self.pollables[self.last_pollable] = when
        return self.last_pollable


class _Current(threading.local):
    """Whose guest runs on this thread."""

    surroundings: Surroundings


current: Final = _Current()


def _now() -> int:
    return time.monotonic_ns() - _STARTED


def _peer() -> Peer:
    peer = current.surroundings.peer
    if peer is None:
        raise Stopped
    return peer


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """An import. Whatever it raises traps the guest: the engine's package would raise it in whichever thread comes next."""

    def imported(store: Any, *args: Any) -> Any:
        try:
            return function(store, *args)
        except WasmtimeError:
            raise
        except Stopped:
            raise WasmtimeError("stopped by the host") from None
        except BaseException as exc:  # noqa: BLE001 - see above
            raise WasmtimeError(f"an import failed: {type(exc).__name__}") from None

    return imported


def _exit(store: Any, status: Any) -> NoReturn:
    _peer().exited = True
    raise Stopped


def _random_bytes(store: Any, count: int) -> bytes:
    if count > _MAX_RANDOM:
        raise Stopped
    return _peer().random_bytes(count)


def _wall_now(store: Any) -> Any:
    now = _peer().number(time.time_ns)
    return SimpleNamespace(seconds=now // 10**9, nanoseconds=now % 10**9)


def _number_of(store: Any, handle: Any) -> int:
    rep: int = (handle.to_host(store) if hasattr(handle, "to_host") else handle).rep
    return rep


def _subscribe(when: int) -> ResourceHost:
    return ResourceHost.own(current.surroundings.new_pollable(when), _POLLABLE)


def _when(store: Any, handle: Any) -> int:
    return current.surroundings.pollables[_number_of(store, handle)]


def _poll(store: Any, handles: list[Any]) -> list[int]:
    if not handles or len(handles) > _MAX_POLLABLES:
        raise Stopped
    whens = [_when(store, handle) for handle in handles]
    now = _peer().sleep_until(_now, min(whens))
    return [index for index, when in enumerate(whens) if when <= now]


def _forget(store: Any, number: int) -> None:
    current.surroundings.pollables.pop(number, None)


#: Instances of the component model to their functions.
_INTERFACES: Final[dict[str, dict[str, Callable[..., Any]]]] = {
    "wasi:cli/environment": {
        "get-environment": lambda store: [],
        "get-arguments": lambda store: [],
        "initial-cwd": lambda store: None,
    },
    "wasi:cli/exit": {"exit": _exit},
    "wasi:filesystem/preopens": {"get-directories": lambda store: []},
    "wasi:random/random": {
        "get-random-bytes": _random_bytes,
        "get-random-u64": lambda store: _peer().number(lambda: secrets.randbits(64)),
    },
    "wasi:clocks/wall-clock": {
        "now": _wall_now,
        "resolution": lambda store: SimpleNamespace(seconds=0, nanoseconds=1000),
    },
    "wasi:io/poll": {
        "[method]pollable.ready": lambda store, handle: _when(store, handle) <= _peer().number(_now),
        "[method]pollable.block": lambda store, handle: _peer().sleep_until(_now, _when(store, handle)) and None,
        "poll": _poll,
    },
    "wasi:clocks/monotonic-clock": {
        "now": lambda store: _peer().number(_now),
        "resolution": lambda store: 1000,
        "subscribe-instant": lambda store, when: _subscribe(when),
        "subscribe-duration": lambda store, span: _subscribe(_peer().number(_now) + span),
    },
}
_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "suspend": lambda store, frame: _peer().suspend(frame),
    "write-out": lambda store, descriptor, raw, text: _peer().write_out(descriptor, raw, text),
    "seed": lambda store: _peer().number(lambda: secrets.randbits(64)),
    "text-piece": lambda store, start: _peer().text_piece(start),
}


def linker(engine: Engine, component: Component) -> Linker:
    """Imports for every instance of ``component``. They find out by the thread whose instance calls."""
    made = Linker(engine)
    made.allow_shadowing = True
    with made.root() as root:
        for name, functions in _INTERFACES.items():
            with root.add_instance(name + _VERSION) as instance:
                if name == "wasi:io/poll":
                    instance.add_resource("pollable", ResourceType.host(_POLLABLE), _forget)
                for function_name, function in functions.items():
                    instance.add_func(function_name, _guarded(function))
        for function_name, function in _FUNCTIONS.items():
            root.add_func(function_name, _guarded(function))
    made.define_unknown_imports_as_traps(component)
    return made
