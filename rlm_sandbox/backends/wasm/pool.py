"""Ready instances: a session takes one that was made, and has run its first requests, while nobody waited.

The first requests of an instance are the same for all, and whatever it is told of times and random numbers is what the
first instance of this process was told: so all instances are alike, which a replay relies on. A session's own random
numbers are drawn when it is configured. That is done ahead, too, with what the last session was configured with; the
entry of that request begins the journal of the session that takes the instance.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from typing import Final

from ...errors import BackendUnavailable
from ...waiting import take
from ...wire.messages import Configure, Exec, Message, dump_message
from ...wire.strings import dump_string
from .cell_threads import in_cell_thread
from .engine import LoadedEngine
from .idle import IdleWorker
from .instance import Instance
from .journal import Entry
from .peer import LivePeer, ReplayPeer

__all__ = ("InstancePool",)

log: Final = logging.getLogger("rlm_sandbox.wasm")

#: Configured for a session, and bare for a recovery.
_CONFIGURED: Final = 2
_BARE: Final = 1
#: After one was taken: its taker needs the processor more.
_PAUSE_SECONDS: Final = 0.02
#: They touch what the start of a session and every cell touch.
_FIRST: Final[tuple[Message, ...]] = (
    Exec(0, "def rlm_first():\n    return [1]\nrlm_first()\ndel rlm_first", [], 0),
    Configure(0, None, ""),
)
_SECONDS: Final = 30.0


class InstancePool:
    """A few instances that have served nobody. Thread-safe."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self.idle = IdleWorker()
        self._configured: deque[tuple[Instance, Entry]] = deque()
        self._bare: deque[Instance] = deque()
        self._configuration = ""
        self._taken = threading.Event()
        self._recording = threading.Lock()
        self._first: list[Entry] = []
        threading.Thread(target=self._fill, name="rlm-sandbox-wasm-pool", daemon=True).start()

    def take(self, configuration: str) -> tuple[Instance, Entry | None]:
        """An instance for a session; with it, if it is configured already, the entry of that request.

        Args:
            configuration: the frame a session will be configured with, empty if none can be ahead.

        Raises:
            BackendUnavailable: there is no address space for it.
        """
        if not configuration:
            return self.take_bare(), None
        self._configuration = configuration
        try:
            while True:
                instance, entry = self._configured.popleft()
                self._taken.set()
                if entry.request == configuration:
                    return instance, entry
        except IndexError:
            return self.take_bare(), None

    def take_bare(self) -> Instance:
        """An instance that only the first requests were run in: a ready one, else a new one.

        Raises:
            BackendUnavailable: there is no address space for it.
        """
        try:
            instance = self._bare.popleft()
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
                while len(self._bare) < _BARE:
                    self._bare.append(self._make())
                while self._configuration and len(self._configured) < _CONFIGURED:
                    instance = self._make()
                    self._configured.append((instance, _record(instance, self._configuration)))
            except BackendUnavailable:
                continue  # whoever needs one is told
            except Exception:  # the thread serves every later session, too
                log.exception("ready instances could not be made")

    def _make(self) -> Instance:
        with self._recording:
            if not self._first:
                instance = in_cell_thread(lambda: Instance(self._loaded))
                self._first = [_record(instance, dump_string(dump_message(message), [], max_chars=1 << 20)) for message in _FIRST]
                return instance
        return in_cell_thread(self._make_alike)

    def _make_alike(self) -> Instance:
        """On a cell thread, all of it: each switch of threads would cost as much as one of these requests."""
        instance = Instance(self._loaded)
        for entry in self._first:
            peer = ReplayPeer(entry)
            instance.run(entry.request, peer)
            if not peer.matched:
                raise BackendUnavailable("wasm", "two instances of the guest did not start alike", "report this as a bug")
        return instance


def _record(instance: Instance, request: str) -> Entry:
    """Run a request of ours that needs no host."""
    entry = Entry(request)
    peer = LivePeer(entry)
    instance.start(entry.request, peer)
    try:
        while peer.ended is None and peer.failed is None:
            take(peer.signals, _SECONDS)
    except queue.Empty:
        peer.stop()
    if peer.ended is None:
        raise BackendUnavailable("wasm", f"the guest does not start: {peer.failed or 'no answer'}", "reinstall rlm-sandbox")
    entry.ended = hash(peer.ended)
    return entry
