"""What takes seconds and happens once says so: on a terminal with the time passing, else in the log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ("progress",)

log: Final = logging.getLogger("rlm_sandbox.wasm")


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show that ``what`` is under way while this is entered."""
    started = time.monotonic()
    log.info("%s", what)
    done = threading.Event()
    shown = sys.stderr is not None and sys.stderr.isatty()
    thread = threading.Thread(target=_show, args=(what, started, done), name="rlm-sandbox-progress", daemon=True)
    if shown:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if shown:
            thread.join()
        log.info("%s: %.1f s", what, time.monotonic() - started)


def _show(what: str, started: float, done: threading.Event) -> None:
    while True:
        ended = done.wait(1.0)
        sys.stderr.write(f"\rrlm_sandbox: {what} ... {time.monotonic() - started:.0f} s" + ("\n" if ended else ""))
        sys.stderr.flush()
        if ended:
            return
