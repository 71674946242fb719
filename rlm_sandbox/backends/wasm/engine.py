"""The engine of this process: its configuration, the loaded component, and the clock that makes guests look at deadlines."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wasmtime import Config, Engine
from wasmtime.component import Component, Linker

from . import _capi_unsafe as capi
from .cache import compiled_file
from .component import GuestComponent, find_component
from .wasi import linker

__all__ = ("CONFIGURATION", "LoadedEngine", "shared_engine")

#: Deep enough for an ordinary program's recursion and for JSON nested 200,000 levels deep, which must end in
#: RecursionError. A cell thread's stack is twice as large.
_WASM_STACK: Final = 32 << 20
_ASYNC_STACK: Final = _WASM_STACK + (8 << 20)
#: Names everything that compiled code depends on besides the engine's version and the component.
CONFIGURATION: Final = f"epoch,stack={_WASM_STACK}"
#: How often a running guest looks at its deadline.
_TICK_SECONDS: Final = 0.01
#: Idle ticks before the clock stops: starting it again costs a thread switch.
_IDLE_TICKS: Final = 20


class _Clock:
    """Ticks while a guest runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._running = 0
        self._needed = threading.Event()
        threading.Thread(target=self._run, name="rlm-sandbox-wasm-clock", daemon=True).start()

    def start(self) -> None:
        """A guest runs: ticks come until as many `stop`."""
        with self._lock:
            self._running += 1
        if not self._needed.is_set():
            self._needed.set()

    def stop(self) -> None:
        """A guest runs no more."""
        with self._lock:
            self._running -= 1

    def _run(self) -> None:
        idle = 0
        while True:
            time.sleep(_TICK_SECONDS)
            if self._running:
                idle = 0
            else:
                idle += 1
            if idle > _IDLE_TICKS:
                self._needed.clear()
                if not self._running:
                    self._needed.wait()
                idle = 0
            capi.tick(self._engine)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """What instances are made from."""

    engine: Engine
    component: Component
    linker: Linker
    clock: _Clock
    source: GuestComponent


def _make_engine() -> Engine:
    config = Config()
    config.epoch_interruption = True
    capi.set_async_stack_size(config, _ASYNC_STACK)
    config.max_wasm_stack = _WASM_STACK
    return Engine(config)


def _load(cache: Path | None) -> LoadedEngine:
    source = find_component(cache)
    engine = _make_engine()
    component = compiled_file(engine, source, CONFIGURATION, cache)
    return LoadedEngine(engine, component, linker(engine, component), _Clock(engine), source)


_lock: Final = threading.Lock()
_loaded: dict[tuple[int, Path | None], LoadedEngine] = {}


def shared_engine(cache: Path | None = None) -> LoadedEngine:
    """This process's engine, made on the first call: a fork has threads of its own.

    Args:
        cache: where compiled code is kept, None for the user's cache.

    Raises:
        BackendUnavailable: the component is missing or damaged, or the cache cannot be used.
    """
    key = (os.getpid(), cache)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load(cache)
        return _loaded[key]
