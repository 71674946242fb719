"""What the orchestrator needs of a language model: `LLMAdapter`. Implementations live in `rlm_sandbox.adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypedDict

from ..errors import SandboxError

if TYPE_CHECKING:
    from .trace import Trace

__all__ = ("AdapterError", "AdapterErrorKind", "Completion", "LLMAdapter", "Message", "TokenUsage", "estimate_tokens")

AdapterErrorKind = Literal["auth", "model", "connection", "timeout", "rate_limit", "request", "server", "response", "script"]

#: Characters per token where no tokenizer is asked. English is near 4; code and other scripts have fewer, so that 3
#: errs on the side of a budget that ends early.
CHARS_PER_TOKEN: Final = 3


class AdapterError(SandboxError):
    """A model could not be asked, or did not answer. One sentence and a remedy, and never a key.

    The session is usable. ``kind`` says whether a retry is sensible: ``connection``, ``timeout``, ``rate_limit`` and
    ``server`` later; the others only after a change. ``retries`` has what each attempt before the last one came to.
    ``trace`` is set when it ended a run: the steps made until then.
    """

    def __init__(self, kind: AdapterErrorKind, message: str, *, retries: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kind: AdapterErrorKind = kind
        self.retries = retries
        self.trace: Trace | None = None


class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of one or more completions. ``estimated`` if any of it was counted by us and not by the provider."""

    input_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.estimated or other.estimated,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """A model's reply. ``finish_reason`` is the provider's word (``stop``, ``length``, ...) or None.

    ``retries``: what each attempt before the successful one came to, such as ``status 429``; empty if it was the first.
    """

    text: str
    usage: TokenUsage = TokenUsage()
    finish_reason: str | None = None
    retries: tuple[str, ...] = ()


class LLMAdapter(Protocol):
    """A language model. Called from several threads at once by ``llm_batch``."""

    @property
    def model(self) -> str:
        """The name of the model asked by default, for events and traces."""

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seconds: float | None = None,
    ) -> Completion:
        """Ask the model.

        Args:
            messages: the conversation, oldest first.
            model: another model of the same provider; None for the adapter's own.
            max_tokens: cap of the reply; None for the provider's default.
            temperature: None for the provider's default.
            seconds: give up after that long, retries and all; None for the adapter's own limits. An adapter that cannot
                is left behind: its caller does not wait longer.

        Raises:
            AdapterError: it could not be asked, or did not answer.
        """


def estimate_tokens(text: str) -> int:
    """A cautious count of the tokens of ``text``, without a tokenizer."""
    return len(text) // CHARS_PER_TOKEN + 1
