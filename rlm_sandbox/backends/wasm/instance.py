"""`Instance`: one guest, from the component's snapshot to its end. It runs requests one after another, each to its end."""

from __future__ import annotations

import sys
import threading
from typing import Final

from wasmtime import Store, WasmtimeError

from ...errors import BackendUnavailable, UnsupportedLimit
from . import _capi_unsafe as capi
from .cell_threads import in_cell_thread, run_in_cell_thread
from .engine import LoadedEngine
from .peer import LivePeer, ReplayPeer
from .wasi import Surroundings, current

__all__ = ("MIN_MEMORY_MB", "Instance")

#: The component's own memory, interpreter and modules, and room for a cell.
MIN_MEMORY_MB: Final = 48
_NO_LIMIT: Final = 1 << 32
#: The interpreter's tables have their size from the start; the memory of any other table would be counted nowhere.
_TABLE_ELEMENTS: Final = 1 << 16
#: What the engine says when a guest ends, to how the sentence "the guest was killed: ..." goes on.
_REASONS: Final = {
    "call stack exhausted": "it exhausted its stack",
    "fuel allocated for hostcalls": "it sent more at once than may cross",
    "unreachable": "its interpreter aborted",
    "out of bounds": "its interpreter accessed memory that is not its own",
    "unknown import": "it used something that this sandbox does not have, or its interpreter ran out of memory",
}


class Instance:
    """A guest. Not thread-safe: one request at a time; it is made, runs and ends on cell threads."""

    def __init__(self, loaded: LoadedEngine) -> None:
        """
        Raises:
            BackendUnavailable: there is no address space for it.
        """
        self._loaded = loaded
        self._surroundings = Surroundings()
        self._store = Store(loaded.engine)
        # Through its surroundings: a reference back to this would keep a dead guest's memory until a garbage collection.
        self._at_tick = capi.on_epoch(self._store, self._surroundings.must_stop)
        try:
            instance = loaded.linker.instantiate(self._store, loaded.component)
        except WasmtimeError as exc:
            raise BackendUnavailable(
                "wasm", f"an instance cannot be made ({_last_line(exc)})", "close sessions, or raise the limit of address space"
            ) from None
        function = instance.get_func(self._store, "request")
        assert function is not None
        self._function = function
        self._lock = threading.Lock()
        self._discarded = False

    def limit_memory(self, megabytes: int | None) -> None:
        """Bound the guest's memory from now on."""
        self._store.set_limits(memory_size=_NO_LIMIT if megabytes is None else megabytes << 20, table_elements=_TABLE_ELEMENTS)

    def start(self, frame: str, peer: LivePeer | ReplayPeer) -> None:
        """Run one request on a cell thread. ``peer.end`` is called with what came of it; it never raises."""
        run_in_cell_thread(lambda: self.run(frame, peer))

    def run(self, frame: str, peer: LivePeer | ReplayPeer) -> None:
        """Run one request on this thread, which must be a cell thread. See `start`."""
        # The engine's store is for one thread at a time, and does not check it: two would corrupt the host's memory.
        if not self._lock.acquire(blocking=False):
            peer.end(None, "it was still running its last request")
            return
        try:
            answer, why = (None, "it was discarded") if self._discarded else self._call(frame, peer)
            if self._discarded:
                self._store.close()
        finally:
            self._lock.release()
        peer.end(answer, why)  # last: the next request may begin on another thread at once

    def _call(self, frame: str, peer: LivePeer | ReplayPeer) -> tuple[str | None, str | None]:
        current.surroundings = self._surroundings
        self._surroundings.peer = peer
        self._loaded.clock.start()
        try:
            return capi.call_with_text(self._function, self._store, frame), None
        except BaseException as exc:  # noqa: BLE001 - the engine's errors, and what a damaged guest makes of a string
            return None, _reason(peer, exc)
        finally:
            self._loaded.clock.stop()
            self._surroundings.peer = None

    def discard(self) -> None:
        """Give its memory back: now, or when the request that still runs has ended. Nothing can be run in it any more."""
        self._discarded = True
        if threading.current_thread() is threading.main_thread() and not sys.is_finalizing():
            in_cell_thread(self._close)
        else:
            self._close()

    def _close(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._store.close()
            finally:
                self._lock.release()


def check_memory_limit(megabytes: int | None) -> None:
    """Raises `UnsupportedLimit` for a limit below what a guest needs to run at all."""
    if megabytes is not None and megabytes < MIN_MEMORY_MB:
        raise UnsupportedLimit(
            f"backend 'wasm' cannot run in memory_mb={megabytes}: its interpreter alone needs {MIN_MEMORY_MB}; "
            f"ask for memory_mb={MIN_MEMORY_MB} or more, or choose another backend"
        )


def _reason(peer: LivePeer | ReplayPeer, exc: BaseException) -> str:
    if peer.exited:
        return "it ended its process"
    text = str(exc)
    return next((reason for sign, reason in _REASONS.items() if sign in text), "it trapped")


def _last_line(exc: WasmtimeError) -> str:
    lines = str(exc).strip().splitlines()
    return lines[-1].strip()[:200] if lines else "no message"
