"""Work that waits until its session has been idle for a moment, so that it does not compete with cells that follow each other."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from typing import Final, Protocol

__all__ = ("IDLE_SECONDS", "IdleWork", "IdleWorker")

#: A model thinks for longer between two cells, a loop over `exec` does not.
IDLE_SECONDS: Final = 0.02


class IdleWork(Protocol):
    """What is to be done. ``busy_until`` is the time until which its session counts as busy."""

    busy_until: float

    def when_idle(self) -> None: ...


class IdleWorker:
    """One thread for all sessions of a process. It keeps none of them alive."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[weakref.ref[IdleWork]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ask(self, work: IdleWork) -> None:
        """Have ``work`` done when its session is idle. Ask once, until it is done."""
        self._asked.put(weakref.ref(work))
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="rlm-sandbox-wasm-idle", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            reference = self._asked.get()
            work = reference()
            wait = 0.0 if work is None else work.busy_until - time.monotonic()
            if work is not None and wait <= 0:
                work.when_idle()
            del work
            if wait > 0:
                time.sleep(min(wait, IDLE_SECONDS))
                self._asked.put(reference)
