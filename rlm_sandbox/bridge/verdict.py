"""What a turn came to, in the words of the contract: decided from what the host saw; the guest's words only fill in messages."""

from __future__ import annotations

import os
import signal
from typing import Any

from ..errors import GuestCrashed, GuestError, LimitExceeded, ProtocolViolation
from ..limits import Limits
from ..results import LimitHit, Opaque, Outcome, State
from ..wire.codec import OpaqueValue
from ..wire.messages import TOO_LARGE
from .exchange import TurnEnd
from .guest import Death

__all__ = ("from_guest", "how_it_died", "judge", "killed_error", "turn_error", "worse")


def judge(end: TurnEnd, death: Death, peak_mb: float | None, limits: Limits) -> tuple[Outcome, str | None, LimitHit | None]:
    """Outcome, error text and limit of a cell.

    A MemoryError or an oversized value is the guest's own word (``source="guest"``): without a cgroup the kernel only
    refuses an allocation and tells nobody. With one, it may kill and say so (``source="kernel"``). Every other limit was
    measured by the host.
    """
    if end.hit is not None:
        kind = "TimeLimit" if "seconds" in end.hit.kind else "LimitExceeded"
        return "limit", f"{kind}: the cell hit {end.hit.kind}={end.hit.limit:,}", end.hit
    if end.interrupted:
        return "interrupted", "KeyboardInterrupt: the cell was interrupted", None
    if end.failure is not None and end.failure[0] == "MemoryError" and limits.memory_mb is not None:
        return "limit", f"MemoryError: {end.failure[1]}", LimitHit("memory_mb", limits.memory_mb, peak_mb, "guest")
    if end.failure is not None and end.failure[0] == TOO_LARGE and limits.value_bytes is not None:
        return "limit", f"LimitExceeded: {end.failure[1]}", LimitHit("value_bytes", limits.value_bytes, None, "guest")
    if end.kind == "violation":
        return "violation", f"ProtocolViolation: the guest broke the protocol ({end.detail})", None
    if end.kind == "died" and death.out_of_memory and limits.memory_mb is not None:
        text = f"LimitExceeded: the kernel killed the guest for its memory (memory_mb={limits.memory_mb:,})"
        return "limit", text, LimitHit("memory_mb", limits.memory_mb, death.peak_memory_mb, "kernel")
    if end.kind in ("died", "killed"):
        return "crashed", f"GuestCrashed: the guest {how_it_died(death)}", None
    if end.failure is None:
        return "ok", None, None
    type_name, message, _ = end.failure
    return "error", f"{type_name}: {message}" if message else type_name, None


def turn_error(end: TurnEnd, limits: Limits) -> BaseException | None:
    """What a finished turn that was no cell raises, or None."""
    if end.host_interrupted:
        return KeyboardInterrupt()
    if end.hit is not None:
        return LimitExceeded(end.hit.kind, end.hit.limit, end.hit.observed)
    if end.failure is None:
        return None
    if end.failure[0] == TOO_LARGE and limits.value_bytes is not None:
        return LimitExceeded("value_bytes", limits.value_bytes)
    return GuestError(*end.failure)


def killed_error(end: TurnEnd, state: State, death: Death) -> BaseException:
    """What a turn that was no cell and cost the guest its life raises."""
    if end.host_interrupted:
        return KeyboardInterrupt()
    if end.hit is not None:
        return LimitExceeded(end.hit.kind, end.hit.limit, end.hit.observed)
    if end.kind == "violation":
        return ProtocolViolation(f"the guest broke the protocol ({end.detail}) and was killed; the session's state is {state}")
    return GuestCrashed(f"the guest {how_it_died(death)}; the session's state is {state}", exit_status=death.status, state=state)


def worse(first: State, second: State) -> State:
    """The worse of two states."""
    order: tuple[State, ...] = ("kept", "restored", "lost")
    return max(first, second, key=order.index)


def how_it_died(death: Death) -> str:
    """How a worker ended, as the second half of a sentence."""
    if death.why:
        return f"was killed: {death.why}"
    if death.out_of_memory:
        return "was killed by the kernel for its memory"
    if death.status is None:
        return "died"
    if os.WIFSIGNALED(death.status):
        number = os.WTERMSIG(death.status)
        try:
            return f"was killed by {signal.Signals(number).name}"
        except ValueError:
            return f"was killed by signal {number}"
    return f"exited with status {os.WEXITSTATUS(death.status)}"


def from_guest(value: Any) -> Any:
    """A decoded guest value with the codec's own types turned into the contract's. Its depth is bounded by the codec."""
    if type(value) is OpaqueValue:
        return Opaque(value.type_name, value.repr)
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(from_guest(item) for item in value)
    if type(value) is dict:
        return {from_guest(key): from_guest(item) for key, item in value.items()}
    return value
