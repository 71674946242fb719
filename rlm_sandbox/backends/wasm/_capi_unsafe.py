"""The calls into the engine's C library that its Python package does not wrap. The only use of its private parts.

Pinned to one minor version of the package in ``pyproject.toml``; `tests/unit/test_wasm_engine.py` shows that they work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from wasmtime import Config, Engine, Store, WasmtimeError, _ffi
from wasmtime.component import Func

__all__ = ("call_with_text", "on_epoch", "set_async_stack_size", "stopped", "tick")

_CONTINUE: Final = 0
#: Copying this much costs less than making a ctypes type of its length.
_SHORT_BYTES: Final = 64 * 1024
_Bytes: Final = ctypes.POINTER(ctypes.c_uint8)
_Callback: Final = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.POINTER(_ffi.wasmtime_context_t),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint8),
)
_Finalizer: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_NO_FINALIZER: Final = _Finalizer()


def set_async_stack_size(config: Config, size: int) -> None:
    """It must be above ``max_wasm_stack``, or the engine aborts the process."""
    _ffi.wasmtime_config_async_stack_size_set(config.ptr(), size)


def tick(engine: Engine) -> None:
    """Let every store of the engine look at its deadline."""
    engine.increment_epoch()


def stopped(message: str) -> int:
    """An error to return from a callback; the engine frees it."""
    return ctypes.cast(WasmtimeError(message)._consume(), ctypes.c_void_p).value or 0


def on_epoch(store: Store, must_stop: Callable[[], bool]) -> Any:
    """Ask ``must_stop`` at every tick while the guest runs; trap it if so. Keep what is returned as long as the store."""

    def at_tick(context: Any, data: Any, delta: Any, kind: Any) -> int:
        if must_stop():
            return stopped("stopped by the host")
        delta[0] = 1
        kind[0] = _CONTINUE
        return 0

    callback = _Callback(at_tick)
    _ffi.wasmtime_store_epoch_deadline_callback(store.ptr(), callback, None, _NO_FINALIZER)
    store.set_epoch_deadline(1)
    return callback


def call_with_text(function: Func, store: Store, text: str) -> str:
    """Call a function from one string to one string, without asking the engine for its type each time.

    Raises:
        WasmtimeError: it trapped.
    """
    data = text.encode("utf-8")  # lent: the engine only reads an argument, and it is ours until this returns
    argument = _ffi.wasmtime_component_val_t()
    argument.kind = _ffi.WASMTIME_COMPONENT_STRING
    argument.of.string.size = len(data)
    argument.of.string.data = ctypes.cast(ctypes.c_char_p(data), _Bytes)
    result = _ffi.wasmtime_component_val_t()
    error = _ffi.wasmtime_component_func_call(
        ctypes.byref(function._func), store._context(), ctypes.byref(argument), 1, ctypes.byref(result), 1
    )
    if error:
        raise WasmtimeError._from_ptr(error)
    return _text_of(result)


def _text_of(value: Any) -> str:
    try:
        vector = value.of.string
        if not vector.size:
            return ""
        if vector.size <= _SHORT_BYTES:
            return ctypes.string_at(vector.data, vector.size).decode("utf-8")
        # Decoded where it is: a copy of the bytes would be one more of the guest's largest frame.
        return str(ctypes.cast(vector.data, ctypes.POINTER(ctypes.c_ubyte * vector.size)).contents, "utf-8")
    finally:
        _ffi.wasmtime_component_val_delete(ctypes.byref(value))
