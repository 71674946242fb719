"""Work that waits until its session has been idle for a moment, so that it does not compete with cells that follow each other."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from typing import Final, Protocol

__all__ = ("IDLE_SECONDS", "IdleWork", "IdleWorker")

#: A model thinks for longer between two cells, a loop over `exec` does not.
IDLE_SECONDS: Final = 0.02

log: Final = logging.getLogger("rlm_sandbox.wasm")


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
        waiting: list[weakref.ref[IdleWork]] = []
        while True:
            if not waiting:
                waiting.append(self._asked.get())
            while not self._asked.empty():
                waiting.append(self._asked.get())
            # All of them are looked at, then one wait serves all: a busy session does not keep the others waiting.
            waiting = [reference for reference in waiting if not _done(reference)]
            if waiting:
                time.sleep(IDLE_SECONDS / 2)


def _done(reference: weakref.ref[IdleWork]) -> bool:
    """Do it if its session is idle; whether nothing of it is left to do."""
    work = reference()
    if work is None:
        return True
    if work.busy_until > time.monotonic():
        return False
    try:
        work.when_idle()
    except Exception:  # the thread serves others
        log.exception("work of an idle session failed")
    return True
