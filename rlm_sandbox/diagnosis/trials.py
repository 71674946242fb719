"""One trial: a function in a forked process of its own, which it may ruin, with a time limit.

Fork only a process without threads: `rlm_sandbox.diagnosis.child` is one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ("Refused", "TrialResult", "attempt")

#: A trial takes milliseconds; what takes this long hangs.
TRIAL_SECONDS: Final = 5.0
#: One write of at most this many bytes to a pipe is never split.
_MAX_REPORT: Final = 4096


class Refused(Exception):
    """The mechanism is there and does not do what it is for. The text says what happened instead."""


@dataclass(frozen=True, slots=True)
class TrialResult:
    """``found`` says what was seen; ``errno`` is that of a refused system call, else 0."""

    works: bool
    found: str
    errno: int = 0


def attempt(trial: Callable[[], str], seconds: float = TRIAL_SECONDS) -> TrialResult:
    """Run ``trial`` in a child. It works if it returns; whatever it raises, or its death, says why it does not."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.close(read)
            os.write(write, json.dumps(_run(trial)).encode()[:_MAX_REPORT])
        finally:
            os._exit(0)
    os.close(write)
    try:
        return _outcome(read, time.monotonic() + seconds)
    finally:
        os.close(read)
        try:
            os.killpg(pid, signal.SIGKILL)  # what the trial itself started goes with it
        except OSError:
            pass  # it had ended, or not yet become a group of its own
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
        os.waitpid(pid, 0)


def _run(trial: Callable[[], str]) -> tuple[bool, str, int]:
    try:
        return True, trial(), 0
    except OSError as exc:
        return False, _said(exc), exc.errno or 0
    except Refused as exc:
        return False, str(exc), 0
    except BaseException as exc:  # noqa: BLE001 - a trial that fails in any other way has not shown that it works
        return False, f"{type(exc).__name__}: {exc}"[:300], 0


def _said(exc: OSError) -> str:
    """The sentence of a refused system call, without the path Python adds to some: it is one of this machine's."""
    return exc.strerror or type(exc).__name__


def _outcome(read: int, until: float) -> TrialResult:
    if not select.select([read], [], [], max(0.0, until - time.monotonic()))[0]:
        return TrialResult(False, "it did not end in time")
    report = os.read(read, _MAX_REPORT)
    if not report:
        return TrialResult(False, "the process that tried it died")
    works, found, errno = json.loads(report)
    return TrialResult(bool(works), str(found), int(errno))
