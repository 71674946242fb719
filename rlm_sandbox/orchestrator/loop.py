"""`RLM`: the loop. Ask the model, run its code, feed back what came of it, until it answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..context import Context
from ..limits import Limits
from ..options import BackendOptions
from ..protocol import Grade, REPLProtocol
from .events import Listener
from .llm import LLMAdapter
from .policy import Policy
from .trace import Trace

__all__ = ("RLM", "ReplFactory")


class ReplFactory(Protocol):
    """Opens the session of one run, instead of ``open_repl``. It must run ``setup`` as ``open_repl`` would."""

    def __call__(self, *, limits: Limits, setup: str) -> REPLProtocol: ...


class RLM:
    def __init__(
        self,
        adapter: LLMAdapter,
        *,
        repl_backend: str = "auto",
        limits: Limits | None = None,
        policy: Policy | None = None,
        options: BackendOptions | None = None,
        accept: Grade = Grade.HARD,
        trusted: bool = False,
        listeners: Iterable[Listener] = (),
        subcall_adapter: LLMAdapter | None = None,
        system_prompt: str | None = None,
        temperature: float | None = None,
        repl_factory: ReplFactory | None = None,
    ) -> None:
        raise NotImplementedError

    def run(self, query: str, context: Context | str) -> tuple[str, Trace]:
        raise NotImplementedError
