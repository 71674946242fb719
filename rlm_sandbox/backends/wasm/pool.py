"""Ready instances: a session takes one that was made, and has run its first request, while nobody waited.

The first request of an instance is the same for all, and whatever it is told of times and random numbers is what the
first instance of this process was told: so all instances are alike, which a replay relies on. A session's own random
numbers are drawn when it is configured.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Final

from ...errors import BackendUnavailable
from ...wire.messages import Exec, dump_message
from ...wire.strings import dump_string
from .engine import LoadedEngine
from .instance import Instance
from .journal import Entry
from .peer import LivePeer, ReplayPeer

__all__ = ("InstancePool",)

_READY: Final = 2
#: After one was taken: its taker needs the processor more.
_PAUSE_SECONDS: Final = 0.02
#: Touches what every cell touches.
_FIRST_CELL: Final = "def rlm_first():\n    return [1]\nrlm_first()\ndel rlm_first"
_SECONDS: Final = 30.0


class InstancePool:
    """A few instances that have served nobody. Thread-safe."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self._ready: deque[Instance] = deque()
        self._taken = threading.Event()
        self._recording = threading.Lock()
        self._first: Entry | None = None
        threading.Thread(target=self._fill, name="rlm-sandbox-wasm-pool", daemon=True).start()

    def take(self) -> Instance:
        """An instance: a ready one, else a new one.

        Raises:
            BackendUnavailable: there is no address space for it.
        """
        try:
            instance = self._ready.popleft()
        except IndexError:
            instance = self._make()
        self._taken.set()
        return instance

    def _fill(self) -> None:
        while True:
            self._taken.wait()
            time.sleep(_PAUSE_SECONDS)
            self._taken.clear()
            try:
                while len(self._ready) < _READY:
                    self._ready.append(self._make())
            except BackendUnavailable:
                continue  # whoever needs one is told

    def _make(self) -> Instance:
        instance = Instance(self._loaded)
        with self._recording:
            if self._first is None:
                self._first = _record(instance)
                return instance
        peer = ReplayPeer(self._first)
        instance.start(self._first.request, peer)
        if not peer.done.wait(_SECONDS) or not peer.matched:
            raise BackendUnavailable("wasm", "two instances of the guest did not start alike", "report this as a bug")
        return instance


def _record(instance: Instance) -> Entry:
    """Run the first request of the first instance."""
    entry = Entry(dump_string(dump_message(Exec(0, _FIRST_CELL, [], 0)), [], max_chars=1 << 20))
    peer = LivePeer(entry)
    instance.start(entry.request, peer)
    peer.signals.get(timeout=_SECONDS)
    if peer.ended is None:
        raise BackendUnavailable("wasm", f"the guest does not start: {peer.failed}", "reinstall rlm-sandbox")
    entry.ended = hash(peer.ended)
    return entry
