"""What a feed came to, in the words of the contract: decided from what the host measured and not from what the guest said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ...errors import GuestCrashed, GuestError, LimitExceeded, SandboxError, SessionClosed
from ...limits import Limits
from ...results import LimitHit, Outcome, State
from .interpreter import FeedEnded
from .turn import Clock

__all__ = ("AT_ITS_END", "Verdict", "as_exception", "judge")

AT_ITS_END: Final = "reached its session_seconds"
#: Reasons of `TurnStopped` that are limits.
_LIMIT_FIELDS: Final = ("time_seconds", "wall_seconds", "session_seconds", "host_calls", "value_bytes")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a feed, with what belongs to it."""

    outcome: Outcome
    limit: LimitHit | None = None
    error: str | None = None
    traceback: str | None = None
    exit_status: int | None = None


def judge(ended: FeedEnded, limits: Limits, clock: Clock, *, alive: bool, own_words: Callable[[str], str]) -> Verdict:
    """The verdict on a feed that did not complete.

    Args:
        alive: the worker still lives.
        own_words: an error's text under the name that a host function's failure has.
    """
    if ended.stopped is not None:
        reason = ended.stopped.reason
        if reason not in _LIMIT_FIELDS:
            return Verdict("interrupted", error="the cell was interrupted")
        return _limit(LimitHit(reason, float(getattr(limits, reason) or 0), ended.stopped.observed, "host"))
    ending = ended.ending
    assert ending is not None
    if ending.kind == "memory" and limits.memory_mb is not None:
        # A process that died of it is the kernel's word; the interpreter's own refusal is the guest's side.
        observed = None if ending.observed_bytes is None else ending.observed_bytes / (1 << 20)
        return _limit(LimitHit("memory_mb", limits.memory_mb, observed, "guest" if alive else "kernel"))
    if ending.kind == "time" and limits.time_seconds is not None and clock.guest_seconds >= limits.time_seconds:
        return _limit(LimitHit("time_seconds", limits.time_seconds, clock.guest_seconds, "host"))
    if ending.kind == "died" or not alive:
        return Verdict("crashed", error=ending.failure.text, exit_status=ending.exit_status)
    return Verdict("error", error=own_words(ending.failure.text), traceback=ending.failure.traceback)


def _limit(hit: LimitHit) -> Verdict:
    return Verdict("limit", limit=hit, error=f"the {hit.kind} limit of {hit.limit:g} was hit")


def as_exception(verdict: Verdict, state: State) -> SandboxError:
    """A verdict for a call that raises."""
    hit = verdict.limit
    if hit is not None:
        if hit.kind == "session_seconds":
            return SessionClosed(f"the session {AT_ITS_END}; open a new one")
        return LimitExceeded(hit.kind, hit.limit, hit.observed)
    if verdict.outcome == "error":
        type_name, _, message = (verdict.error or "").partition(": ")
        return GuestError(type_name, message, verdict.traceback or "")
    return GuestCrashed(f"{verdict.error}; the session's state is {state}", exit_status=verdict.exit_status, state=state)
