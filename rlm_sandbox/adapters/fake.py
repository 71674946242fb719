"""`FakeAdapter`: a model that says what it was told to, for tests and demos. No network, no key."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..orchestrator.llm import AdapterError, Completion, Message, TokenUsage, estimate_tokens

__all__ = ("FakeAdapter", "FakeCall", "Response")

Response = str | Completion | BaseException | Callable[[str], str | Completion]
"""What to answer: a text, a whole completion, an exception to raise, or a function of the last user message."""


@dataclass(frozen=True, slots=True)
class FakeCall:
    """One call that was made. ``text`` is the reply, None if it raised."""

    messages: tuple[Message, ...]
    model: str | None
    max_tokens: int | None
    temperature: float | None
    text: str | None

    @property
    def prompt(self) -> str:
        """The last user message."""
        return _last_user_message(self.messages)


@dataclass(slots=True)
class _Rule:
    pattern: re.Pattern[str] | str
    response: Response
    once: bool

    def matches(self, prompt: str) -> bool:
        if isinstance(self.pattern, str):
            return self.pattern in prompt
        return self.pattern.search(prompt) is not None


class FakeAdapter:
    """Answers by the first rule that matches the last user message, else by the script, in order.

    Usable from several threads; ``call_log`` has every call made. Tokens are estimated from the texts.
    """

    def __init__(self, script: Iterable[Response] = (), *, model: str = "fake") -> None:
        if isinstance(script, str):
            raise TypeError("FakeAdapter(script=...) takes a list of replies, not one string; write [reply]")
        self._script = list(script)
        self._model = model
        self._next = 0
        self._rules: list[_Rule] = []
        self._calls: list[FakeCall] = []
        self._lock = threading.Lock()

    @property
    def model(self) -> str:
        """The name given at construction."""
        return self._model

    @property
    def call_log(self) -> tuple[FakeCall, ...]:
        """Every call made so far, in the order in which they ended."""
        with self._lock:
            return tuple(self._calls)

    def add_rule(self, pattern: str, response: Response, *, regex: bool = False, once: bool = False) -> None:
        """Answer ``response`` when the last user message contains ``pattern``. Earlier rules go first.

        Args:
            pattern: a literal text, or a regular expression searched for with ``regex=True``.
            response: see `Response`.
            regex: ``pattern`` is a regular expression.
            once: forget the rule after its first use.

        Raises:
            re.error: ``pattern`` is no regular expression.
        """
        with self._lock:
            self._rules.append(_Rule(re.compile(pattern) if regex else pattern, response, once))

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seconds: float | None = None,
    ) -> Completion:
        """The reply of a rule or of the script.

        Raises:
            AdapterError: no rule matched and the script is at its end.
            BaseException: the reply is an exception.
        """
        prompt = _last_user_message(messages)
        reply: Completion | None = None
        try:
            reply = self._reply(prompt, messages)
        finally:
            # Outside the choice of a reply, so that a slow function holds up no other thread.
            call = FakeCall(tuple(messages), model, max_tokens, temperature, None if reply is None else reply.text)
            with self._lock:
                self._calls.append(call)
        return reply

    def _reply(self, prompt: str, messages: Sequence[Message]) -> Completion:
        response = self._choose(prompt)
        if isinstance(response, BaseException):
            raise response
        said = response(prompt) if callable(response) else response
        if isinstance(said, Completion):
            return said
        asked = sum(estimate_tokens(message["content"]) for message in messages)
        return Completion(said, TokenUsage(asked, estimate_tokens(said), estimated=True), "stop")

    def _choose(self, prompt: str) -> Response:
        with self._lock:
            for rule in self._rules:
                if rule.matches(prompt):
                    if rule.once:
                        self._rules.remove(rule)
                    return rule.response
            if self._next >= len(self._script):
                raise AdapterError(
                    "script",
                    f"the FakeAdapter has no reply: no rule matches and its script of {len(self._script)} is at its end; "
                    f"add a reply to the script or a rule with add_rule()",
                )
            self._next += 1
            return self._script[self._next - 1]


def _last_user_message(messages: Sequence[Message]) -> str:
    for message in reversed(messages):
        if message["role"] == "user":
            return message["content"]
    return ""
