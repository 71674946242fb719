"""`Policy`: the budgets of a run. What a *cell* may use is `Limits`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ..errors import SandboxError

__all__ = ("Policy", "PolicyExceeded")

# Lowest and highest value of each whole-number field, and whether None (no limit) is allowed.
_RANGES: Final[dict[str, tuple[int, int, bool]]] = {
    "max_steps": (1, 100_000, False),
    "max_subcalls": (0, 10_000_000, True),
    "max_total_tokens": (1, 1 << 40, True),
    "max_concurrent_subcalls": (1, 1_000, False),
    "max_output_tokens": (1, 1 << 30, True),
    "max_subcall_output_tokens": (1, 1 << 30, True),
    "max_feedback_chars": (200, 10_000_000, False),
    "max_empty_replies": (1, 100_000, False),
}


class PolicyExceeded(SandboxError):
    """A budget of the run is used up. Raised in the guest by ``llm_query`` and ``llm_batch``, message and all.

    The session is usable; the run goes on with what it has. A retry fails again.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The budgets of one run, enforced in the host call and thereby *during* a cell. None means no limit.

    - ``max_steps``: replies of the root model.
    - ``max_subcalls``: sub-calls, every prompt of a batch counted.
    - ``max_total_tokens``: input and output tokens of the root model and of all sub-calls. Reserved before a call goes
      out, so that parallel calls cannot overrun it together.
    - ``max_seconds``: the whole run; it also ends a cell and a model call that are under way.
    - ``max_concurrent_subcalls``: sub-calls on their way at once.
    - ``max_output_tokens``: cap of one reply of the root model; None leaves it to the provider.
    - ``max_subcall_output_tokens``: cap of one sub-call's reply; ``llm_query(max_tokens=...)`` may only ask for less.
    - ``subcall_models``: models that ``llm_query(model=...)`` may name besides the sub-call adapter's own. The guest
      chooses among these and no others: what is asked of which model is the host's money.
    - ``max_feedback_chars``: what the root model sees of the output of one cell.
    - ``max_empty_replies``: replies in a row with neither code nor an answer after which the run ends.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range.
    """

    max_steps: int = 40
    max_subcalls: int | None = 200
    max_total_tokens: int | None = None
    max_seconds: float | None = None
    max_concurrent_subcalls: int = 32
    max_output_tokens: int | None = None
    max_subcall_output_tokens: int | None = None
    subcall_models: tuple[str, ...] = ()
    max_feedback_chars: int = 10_000
    max_empty_replies: int = 5

    def __post_init__(self) -> None:
        for name, (low, high, optional) in _RANGES.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            or_none = " or None" if optional else ""
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Policy.{name} must be a whole number{or_none}, not {type(value).__name__}")
            if not low <= value <= high:
                hint = "; write None for no limit" if optional else ""
                raise ValueError(f"Policy.{name} must be between {low} and {high}, got {value}{hint}")
        models = self.subcall_models
        if not isinstance(models, tuple) or not all(isinstance(name, str) and name for name in models):
            raise TypeError("Policy.subcall_models takes a tuple of model names; write ('name',) for one")
        seconds = self.max_seconds
        if seconds is None:
            return
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise TypeError(f"Policy.max_seconds must be a number of seconds or None, not {type(seconds).__name__}")
        if not math.isfinite(seconds) or not 0 < seconds <= 10_000_000:
            raise ValueError(
                f"Policy.max_seconds must be above 0 and at most 10,000,000 seconds, got {seconds!r}; write None for no limit"
            )
