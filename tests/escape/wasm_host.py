"""What is watched on the host while a wasm guest attacks: its own process, because that is where the guest is."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final, Self

import psutil

from rlm_sandbox import ExecResult, Limits, REPLProtocol

from .outside import RECOVERY_SECONDS, Attack, everything_said, wait_until, within

__all__ = ("FRAMES", "SMALL", "HostMemory", "Neighbour", "assert_contained", "guest_threads")

#: Small, so that every attack meets its limit soon.
SMALL: Final = Limits(time_seconds=8.0, memory_mb=128, output_bytes=20_000, host_calls=1_000)
#: What an attacker brings along: the raw imports, the session's own modules, and frames of his making.
FRAMES: Final = """
import sys, json, wit_world
main = sys.modules['rlm_guest.runners.wasm_main']
def frame(message, *attachments, table=None):
    head = json.dumps(message)
    return (table or ' '.join([str(len(head)), *(f't{len(a)}' for a in attachments)])) + '\\n' + head + ''.join(attachments)
DONE = frame(['done', None, None, None, False, None])
def call(number, handle, *args):
    return frame(['suspend', [[number, handle, None, ['l'], ['d']]], False])
"""


class HostMemory:
    """The highest resident set of this process above what it was, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.grown_mb = 0.0

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.grown_mb = max(self.grown_mb, self._process.memory_info().rss / 2**20 - self._before)

    def __enter__(self) -> Self:
        self._before = self._process.memory_info().rss / 2**20
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()


class Neighbour:
    """Another session of the process, which must notice nothing; and what a guest must never see or change."""

    SECRET: Final = "canary-7f1d03a9"

    def __init__(self, repl: REPLProtocol, directory: Path) -> None:
        self._repl = repl
        self._file = directory / "canary"
        self._file.write_text(self.SECRET)
        os.environ["RLM_TEST_CANARY"] = self.SECRET
        assert repl.exec("mine = ['untouched']").ok

    def assert_untouched(self, *results: ExecResult) -> None:
        """Nothing was read, changed or left behind."""
        assert self.SECRET not in everything_said(*results)
        assert self._file.read_text() == self.SECRET
        with within(RECOVERY_SECONDS):
            seen = self._repl.exec("import json\nmine, sorted(json.loads('[2, 1]'))")
        assert (seen.outcome, seen.state, seen.value) == ("ok", "kept", "(['untouched'], [1, 2])")

    def close(self) -> None:
        """Take the secret out of the environment."""
        del os.environ["RLM_TEST_CANARY"]


def guest_threads() -> int:
    """Threads of this process in which a guest runs now: its frames are on their stacks."""
    import sys

    names = {thread.ident: thread.name for thread in threading.enumerate()}
    busy = 0
    for ident, frame in sys._current_frames().items():
        if names.get(ident) == "rlm-sandbox-wasm-cell":
            at: object = frame
            while at is not None:
                if at.f_code.co_name == "call_with_text":  # type: ignore[attr-defined]
                    busy += 1
                    break
                at = at.f_back  # type: ignore[attr-defined]
    return busy


def assert_contained(repl: REPLProtocol, attack: Attack, neighbour: Neighbour) -> ExecResult:
    """The attack ends in time and as it may; the next cell finds what was there; nothing of it runs on."""
    if attack.tools:
        assert repl.exec(FRAMES).ok
    assert repl.exec("x = {'kept': [41]}").ok
    # A cell that is to end by itself has time to do so on a loaded machine; one that is to be ended is ended soon.
    seconds = None if "limit" not in attack.outcomes else 0.3 if attack.id.startswith("TIME") else 1.0
    narrow = None if seconds is None else Limits(time_seconds=seconds)
    limit = repl.limits.narrowed(narrow).time_seconds or 0.0
    with within(limit + RECOVERY_SECONDS):
        result = repl.exec(attack.code, limits=narrow)
    assert result.outcome in attack.outcomes, f"{result.outcome}: {result.error}"
    assert result.state in attack.states, f"{result.state}, lost {result.lost_names}"
    with within(limit + RECOVERY_SECONDS):
        following = repl.exec("x['kept'][0] + 1")
    assert (following.outcome, following.value) == ("ok", "42"), f"{following.outcome}: {following.error}"
    assert following.state in attack.after, following.state
    wait_until(lambda: guest_threads() == 0, "a guest runs on after its cell")
    neighbour.assert_untouched(result, following)
    return result
