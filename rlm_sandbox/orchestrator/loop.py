"""`RLM`: the loop. Ask the model, run its code, feed back what came of it, until it answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..context import Context
from ..limits import Limits
from ..options import BackendOptions
from ..protocol import Grade, REPLProtocol
from ..registry import open_repl
from .events import EventStream, Listener
from .llm import AdapterError, LLMAdapter
from .policy import Policy
from .run import Run, RunConfig, prelude_source
from .trace import Trace

__all__ = ("RLM", "ReplFactory")


class ReplFactory(Protocol):
    """Opens the session of one run in place of `open_repl`. ``setup`` is to be run as `open_repl` would run it."""

    def __call__(self, *, limits: Limits, setup: str) -> REPLProtocol: ...


class RLM:
    """A Recursive Language Model: a root model that answers questions about a text it only sees through a sandboxed REPL.

    Args:
        adapter: the root model.
        repl_backend: where its code runs, as in `open_repl`.
        limits: of the session and each of its cells; default `Limits()`.
        policy: budgets of a run; default `Policy()`.
        options: the backend's typed options.
        accept: the lowest grade of enforcement accepted, as in `open_repl`.
        trusted: the code is trusted, as in `open_repl`.
        listeners: called with every event of every run; see `rlm_sandbox.orchestrator.events`.
        subcall_adapter: the model behind ``llm_query`` and ``llm_batch``; default the root model.
        system_prompt: replaces the built-in one.
        temperature: for the root model; None for the provider's default.
        repl_factory: opens the session in place of ``repl_backend`` (tests, backends of third parties).

    Raises:
        TypeError: an argument has the wrong type.
    """

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
        for one in (adapter, subcall_adapter):
            if one is not None and not callable(getattr(one, "complete", None)):
                raise TypeError(f"adapter must have a complete() method, such as OpenAIAdapter('model'); got {type(one).__name__}")
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits must be a Limits, not {type(limits).__name__}")
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy, not {type(policy).__name__}")
        self._listeners = tuple(listeners)
        for listener in self._listeners:
            if not callable(listener):
                raise TypeError(f"a listener is called with each event; a {type(listener).__name__} is not callable")
        self._limits = limits or Limits()
        self._repl_backend = repl_backend
        self._options = options
        self._accept = accept
        self._trusted = trusted
        self._repl_factory = repl_factory
        self._config = RunConfig(
            adapter=adapter,
            subcall_adapter=subcall_adapter or adapter,
            policy=policy or Policy(),
            open_session=self._open_session,
            system_prompt=system_prompt,
            temperature=temperature,
        )

    def run(self, query: str, context: Context | str) -> tuple[str, Trace]:
        """Answer ``query`` about ``context``. Runs are independent of each other: each has its own session.

        At a limit of the policy, the answer is the best one so far, and the trace says ``verified`` false and why.

        Raises:
            BackendUnavailable, UnsupportedLimit: there is no session; see `open_repl`.
            AdapterError: the root model could not be asked; its ``trace`` has the steps made until then.
            TypeError, ValueError: an argument is wrong.
            KeyboardInterrupt: Ctrl-C; the session is closed, and listeners have the end of the run.
        """
        if not isinstance(query, str):
            raise TypeError(f"query must be a str, not {type(query).__name__}")
        if not query.strip():
            raise ValueError("the query is empty; ask something")
        if isinstance(context, str):
            context = Context.from_text(context)
        if not isinstance(context, Context):
            raise TypeError(f"context must be a Context or a str, not {type(context).__name__}; see Context.from_documents")
        trace = Trace()
        # The trace comes first: a listener that takes the process down leaves it complete.
        try:
            answer = Run(self._config, query, context, EventStream((trace, *self._listeners))).go()
        except AdapterError as exc:
            exc.trace = trace
            raise
        return answer, trace

    def _open_session(self) -> REPLProtocol:
        if self._repl_factory is not None:
            return self._repl_factory(limits=self._limits, setup=prelude_source())
        return open_repl(
            self._repl_backend,
            limits=self._limits,
            accept=self._accept,
            trusted=self._trusted,
            setup=prelude_source(),
            options=self._options,
        )
