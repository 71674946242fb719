"""Ctrl-C at the worst moment, as often as a test runs."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

#: Far more than the slowest machine takes to notice a signal; what is interrupted must take longer.
SOON_SECONDS = 40.0


@contextmanager
def unseen_ctrl_c() -> Iterator[Callable[[], None]]:
    """A SIGINT that ends no system call of the main thread, when what this yields is called; it must raise in here, and soon.

    A signal that comes after Python's last look for one and before a wait's system call has begun does not end that wait.
    That cannot be hit at will. What another thread gets has the same effect: the signal is noted, and the main thread's wait
    goes on.
    """
    now = threading.Event()

    def press() -> None:
        now.wait(SOON_SECONDS)
        time.sleep(0.1)  # so that the main thread is in its wait, as a rule; where it is not, this shows less
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        yield now.set
    assert time.monotonic() - started < SOON_SECONDS
    thread.join(SOON_SECONDS)
