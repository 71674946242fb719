"""`Ledger`: what a run has used of its `Policy`, and what is promised to calls that are under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .llm import Message, TokenUsage, estimate_tokens
from .policy import Policy, PolicyExceeded

__all__ = ("Ledger", "Reservation")

#: Under a token budget, the cap of a sub-call's reply that has none of its own.
DEFAULT_REPLY_TOKENS: Final = 4_096
#: A reply cap below this is no reply: the call is refused instead.
LEAST_REPLY_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Reservation:
    """Tokens promised to one call (0 where nothing is budgeted), and the cap to send with it, None for none."""

    tokens: int
    max_tokens: int | None


class Ledger:
    """The account of one run. Usable from several threads: budgets are checked and taken in one step."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._used = TokenUsage()
        self._promised = 0
        self._subcalls = 0

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float | None:
        """Until ``max_seconds``, at least 0; None if there is no such limit."""
        return None if self._policy.max_seconds is None else max(0.0, self._policy.max_seconds - self.seconds)

    @property
    def tokens(self) -> TokenUsage:
        """Used so far; calls under way are not in it."""
        with self._lock:
            return self._used

    def check_time(self) -> None:
        """Do nothing while there is time.

        Raises:
            PolicyExceeded: ``max_seconds`` is over.
        """
        if self.seconds_left == 0:
            raise PolicyExceeded(f"the run's time of {self._policy.max_seconds:g} s is used up; answer with what you have")

    def reserve_reply(self, messages: Sequence[Message]) -> Reservation:
        """Set tokens aside for a reply of the root model.

        Raises:
            PolicyExceeded: too few are left.
        """
        asked = sum(estimate_tokens(message["content"]) for message in messages)
        with self._lock:
            return self._reserve([asked], self._policy.max_output_tokens, None)[0]

    def reserve_subcalls(self, prompts: Sequence[str], max_tokens: int | None) -> list[Reservation]:
        """Take as many sub-calls as there are prompts, and set their tokens aside: all of them or none.

        Raises:
            PolicyExceeded: too few sub-calls, tokens or seconds are left; the message is for the model.
        """
        self.check_time()
        ceiling = self._policy.max_subcall_output_tokens
        caps = [cap for cap in (ceiling, max_tokens) if cap is not None]
        with self._lock:
            limit = self._policy.max_subcalls
            if limit is not None and self._subcalls + len(prompts) > limit:
                raise PolicyExceeded(
                    f"{len(prompts)} sub-calls asked for, {limit - self._subcalls} of {limit} left; "
                    f"use fewer and longer prompts, or answer with what you have"
                )
            asked = [estimate_tokens(prompt) for prompt in prompts]
            reserved = self._reserve(asked, min(caps, default=None), DEFAULT_REPLY_TOKENS)
            self._subcalls += len(prompts)
            return reserved

    def settle(self, reservation: Reservation, usage: TokenUsage) -> None:
        """Replace a promise by what was used."""
        with self._lock:
            self._promised -= reservation.tokens
            self._used += usage

    def release(self, reservation: Reservation) -> None:
        """Give a sub-call back that was never made."""
        with self._lock:
            self._promised -= reservation.tokens
            self._subcalls -= 1

    def _reserve(self, asked: list[int], cap: int | None, default: int | None) -> list[Reservation]:
        """``default``: a reply's cap under a token budget where ``cap`` is None; None for all that is left."""
        budget = self._policy.max_total_tokens
        if budget is None:
            return [Reservation(0, cap) for _ in asked]
        left = budget - self._used.total_tokens - self._promised
        # What a capped reply may take, shared evenly: a budget that is nearly empty still buys short replies.
        share = (left - sum(asked)) // len(asked)
        if share < (LEAST_REPLY_TOKENS if cap is None else min(LEAST_REPLY_TOKENS, cap)):
            raise PolicyExceeded(
                f"about {sum(asked)} tokens asked for and {max(0, left)} of {budget} left; "
                f"use shorter prompts, or answer with what you have"
            )
        wanted = default if cap is None else cap
        reply = share if wanted is None else min(share, wanted)
        self._promised += sum(asked) + reply * len(asked)
        return [Reservation(tokens + reply, reply) for tokens in asked]
