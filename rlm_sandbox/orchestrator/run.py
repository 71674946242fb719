"""One run of the loop: its state, its session, its way to an answer."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any, Final, NoReturn

from ..context import Context
from ..errors import GuestCrashed, GuestError, LimitExceeded, ProtocolViolation, SessionClosed
from ..limits import Limits
from ..protocol import REPLProtocol
from ..results import ExecResult, Opaque, OutputChunk
from ..waiting import take
from .events import (
    AnswerRejected,
    CellFinished,
    CellOutput,
    CellStarted,
    EventStream,
    ModelReplied,
    RunFinished,
    RunStarted,
    StepStarted,
    StopReason,
)
from .feedback import ANSWER_CUT_OFF, CUT_OFF, LAST_CHANCE, NO_ANSWER_YET, describe_cell, first_message, system_prompt
from .ledger import Ledger
from .llm import AdapterError, Completion, LLMAdapter, Message
from .policy import Policy, PolicyExceeded
from .replies import CodeBlock, FinalAnswer, Reply, parse_reply
from .subcalls import GUEST_ERRORS, SubcallDesk

__all__ = ("Run", "RunConfig", "prelude_source")

#: Where the prelude leaves word of an answer, and the text given to ``FINAL``.
FINAL_NAME: Final = "rlm_final"
ANSWER_NAME: Final = "rlm_answer"
#: Names of the REPL that are no answer when a model writes ``FINAL: P``.
_OWN_NAMES: Final = frozenset({"ctx", "P", "llm_query", "llm_batch", "peek", "tail", "lenP", "SHOW_VARS", "FINAL", "FINAL_VAR"})
_MISSING: Final = object()
#: How long an adapter may take to notice that its time is over.
_GIVE_UP_SECONDS: Final = 0.1


def prelude_source() -> str:
    """The guest's functions, as the source a session takes for ``setup``."""
    return resources.files("rlm_sandbox").joinpath("prelude.py").read_text("utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What a run is made from."""

    adapter: LLMAdapter
    subcall_adapter: LLMAdapter
    policy: Policy
    open_session: Callable[[], REPLProtocol]
    system_prompt: str | None
    temperature: float | None


class _Stop(Exception):
    """The run is over. Not an error: how deeper parts of the loop say so."""

    def __init__(self, reason: StopReason, answer: str = "", error: str | None = None) -> None:
        super().__init__(reason)
        self.reason: StopReason = reason
        self.answer = answer
        self.error = error


class _Rejected(Exception):
    """A final answer cannot be taken; the text goes to the model."""


class Run:
    """One run, used once."""

    def __init__(self, config: RunConfig, query: str, context: Context, events: EventStream) -> None:
        self._config = config
        self._policy = config.policy
        self._query = query
        self._context = context
        self._events = events
        self._ledger = Ledger(config.policy)
        self._desk = SubcallDesk(config.subcall_adapter, config.policy, self._ledger, events)
        self._messages: list[Message] = []
        self._step = 0
        self._counted_steps = 0
        self._cell = 0
        self._best = ""
        # `rlm_final["count"]` after the last cell: an answer counts only when it has changed.
        self._finals_seen = 0

    def go(self) -> str:
        """Run to the end; returns the answer.

        Raises:
            BackendUnavailable, UnsupportedLimit: there is no session; no event was emitted.
            AdapterError: the root model could not be asked.
            KeyboardInterrupt: Ctrl-C. The last event has been emitted and the session is closed, as in every case.
        """
        with self._config.open_session() as repl:
            try:
                self._start(repl)
                reason, answer, error = self._concluded(repl)
                self._finish(reason, answer, error)
            except SessionClosed as exc:
                answer = self._best
                self._finish("session_closed", answer, str(exc))
            except AdapterError as exc:
                self._finish("adapter_error", self._best, str(exc))
                raise
            except KeyboardInterrupt:
                self._finish("interrupted", self._best)
                raise
            except BaseException as exc:
                self._finish("error", self._best, f"{type(exc).__name__}: {exc}")
                raise
        return answer

    def _concluded(self, repl: REPLProtocol) -> tuple[StopReason, str, str | None]:
        try:
            self._loop(repl)
        except _Stop as stop:
            answer = stop.answer if stop.reason == "final" else self._best_answer(repl, stop.reason)
            return stop.reason, answer, stop.error

    # ---- start and end

    def _start(self, repl: REPLProtocol) -> None:
        policy, context, config = self._policy, self._context, self._config
        prompt = config.system_prompt
        if prompt is None:
            prompt = system_prompt(repl.capabilities, repl.limits, policy)
        self._events.emit(
            RunStarted(
                run_id=uuid.uuid4().hex, query=self._query, context_chars=context.len_chars(),
                context_documents=context.num_documents(), model=config.adapter.model, subcall_model=config.subcall_adapter.model,
                backend=repl.capabilities.backend, isolation=repl.capabilities.isolation, system_prompt=prompt,
                limits=asdict(repl.limits), policy=asdict(policy),
            )
        )  # fmt: skip
        repl.bind("ctx", context)
        repl.bind("P", context.whole)
        repl.bind("llm_query", self._desk.llm_query, errors=GUEST_ERRORS)
        repl.bind("llm_batch", self._desk.llm_batch, errors=GUEST_ERRORS)
        self._messages = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": first_message(self._query, context)},
        ]

    def _finish(self, reason: StopReason, answer: str, error: str | None = None) -> None:
        tokens = self._ledger.tokens
        self._events.emit(
            RunFinished(
                answer=answer, verified=reason == "final", stop_reason=reason, error=error, steps=self._counted_steps,
                cells=self._cell, subcalls=self._desk.made, input_tokens=tokens.input_tokens,
                output_tokens=tokens.output_tokens, seconds=self._ledger.seconds,
            )
        )  # fmt: skip
        self._events.close()

    # ---- the loop

    def _loop(self, repl: REPLProtocol) -> NoReturn:
        """Ends by raising: `_Stop`, or what went wrong."""
        empty = 0
        for _ in range(self._policy.max_steps):
            completion = self._ask()
            self._counted_steps += 1
            reply = parse_reply(completion.text)
            if not reply.blocks and reply.final is None:
                empty += 1
                # Very likely the answer, only without the marker.
                self._best = reply.prose or self._best
                if empty >= self._policy.max_empty_replies:
                    raise _Stop("max_empty_replies")
                feedback = NO_ANSWER_YET
            else:
                empty = 0
                feedback = self._act_on(repl, reply, cut=completion.finish_reason == "length")
            if completion.finish_reason == "length":
                feedback = f"{feedback}\n\n{CUT_OFF}".strip()
            self._messages.append({"role": "user", "content": feedback})
        raise _Stop("max_steps")

    def _ask(self) -> Completion:
        """The root model's next reply, put into the conversation."""
        try:
            self._ledger.check_time()
        except PolicyExceeded:
            raise _Stop("max_seconds") from None
        try:
            reserved = self._ledger.reserve_reply(self._messages)
        except PolicyExceeded:
            raise _Stop("max_total_tokens") from None
        self._step += 1
        self._events.emit(StepStarted(step=self._step))
        started = time.monotonic()
        completion = self._complete(reserved.max_tokens)
        self._ledger.settle(reserved, completion.usage)
        self._messages.append({"role": "assistant", "content": completion.text})
        self._events.emit(
            ModelReplied(
                step=self._step, text=completion.text, input_tokens=completion.usage.input_tokens,
                output_tokens=completion.usage.output_tokens, seconds=time.monotonic() - started,
                finish_reason=completion.finish_reason, retries=completion.retries,
            )
        )  # fmt: skip
        return completion

    def _complete(self, max_tokens: int | None) -> Completion:
        adapter, temperature, messages = self._config.adapter, self._config.temperature, tuple(self._messages)
        seconds = self._ledger.seconds_left

        def ask() -> Any:
            return adapter.complete(messages, max_tokens=max_tokens, temperature=temperature, seconds=seconds)

        try:
            said = ask() if seconds is None else _within(seconds, ask)
        except AdapterError as exc:
            if exc.kind == "timeout" and self._ledger.seconds_left == 0:
                raise _Stop("max_seconds", error=str(exc)) from exc
            raise
        if not isinstance(said, Completion) or not isinstance(said.text, str):
            raise AdapterError("response", f"the adapter returned a {type(said).__name__} and not a Completion; repair the adapter")
        return said

    def _act_on(self, repl: REPLProtocol, reply: Reply, *, cut: bool) -> str:
        """Run a reply's code, then take its answer; returns what to tell the model. Raises `_Stop` with an answer.

        ``cut``: the reply ended at its output limit, so that a text in it is not the whole answer.
        """
        said: list[str] = []
        for done, block in enumerate(reply.blocks, 1):
            result, final = self._run_cell(repl, block)
            said.append(describe_cell(result, self._cell, repl.limits, self._policy.max_feedback_chars))
            stopped = result.outcome not in ("ok", "error")
            if final is not None:
                said.append(
                    "The cell was stopped, so the FINAL it had called does not count." if stopped else self._take(repl, final)
                )
            if result.ok and final is None:
                continue
            if done < len(reply.blocks):
                said.append(f"The {len(reply.blocks) - done} later code blocks of your reply were not run.")
            if reply.final is not None:
                said.append("The FINAL after the code of your reply was not taken.")
            return "\n\n".join(said)
        if reply.final is not None and cut and reply.final.kind == "text":
            self._best = reply.final.text
            said.append(self._rejected(ANSWER_CUT_OFF))
        elif reply.final is not None:
            said.append(self._take(repl, reply.final))
        return "\n\n".join(said)

    # ---- cells

    def _run_cell(self, repl: REPLProtocol, block: CodeBlock) -> tuple[ExecResult, FinalAnswer | None]:
        self._cell += 1
        limits = self._cell_limits(repl.limits)
        live = _LiveOutput(self._events, self._step, self._cell, limits.output_bytes)
        self._events.emit(CellStarted(step=self._step, cell=self._cell, code=block.code))
        self._desk.begin_cell(self._step, self._cell, limits.wall_seconds)
        started = time.monotonic()
        result: ExecResult | None = None
        try:
            result = repl.exec(block.code, limits=limits, read=(FINAL_NAME,), on_output=live)
        finally:
            self._desk.end_cell()
            # An exception (Ctrl-C, a closed session) still leaves a complete trajectory: what was seen is its output.
            ended = result or ExecResult(outcome="interrupted", stdout=live.text("stdout"), stderr=live.text("stderr"))
            self._report_cell(ended, time.monotonic() - started)
        if result.ok:
            self._best = (result.value or result.stdout).strip() or self._best
        return result, self._new_final(repl, result)

    def _cell_limits(self, session: Limits) -> Limits:
        """The session's limits, ended by the run's own time."""
        left = self._ledger.seconds_left
        if left is None or (session.wall_seconds is not None and session.wall_seconds <= left):
            return session
        return replace(session, wall_seconds=max(left, 0.001))

    def _report_cell(self, result: ExecResult, seconds: float) -> None:
        self._events.emit(
            CellFinished(
                step=self._step, cell=self._cell, outcome=result.outcome, stdout=result.stdout, stderr=result.stderr,
                value=result.value, error=result.error, traceback=result.traceback, limit=result.limit, state=result.state,
                lost_names=result.lost_names, dropped_bytes=result.dropped_bytes, usage=result.usage,
                protected=result.protected, seconds=seconds,
            )
        )  # fmt: skip

    def _new_final(self, repl: REPLProtocol, result: ExecResult) -> FinalAnswer | None:
        """The answer that this cell gave by ``FINAL`` or ``FINAL_VAR``, if it did. Guest data: any of it may be forged."""
        record = result.read.get(FINAL_NAME)
        if record is None and not result.ok:
            # A killed cell reads nothing: find out where the count stands in what is there now.
            record = _quietly(lambda: repl.get(FINAL_NAME))
        if not isinstance(record, dict):
            return None
        count, name = record.get("count"), record.get("name")
        if not isinstance(count, int) or count == self._finals_seen:
            return None
        self._finals_seen = count
        if count == 0 or not isinstance(name, str):
            return None
        return FinalAnswer("variable", name)

    def _count_again(self, repl: REPLProtocol) -> None:
        """A read took the guest down: find out which answers it still knows of."""
        record = _quietly(lambda: repl.get(FINAL_NAME))
        count = record.get("count") if isinstance(record, dict) else 0
        self._finals_seen = count if isinstance(count, int) else 0

    # ---- answers

    def _take(self, repl: REPLProtocol, final: FinalAnswer) -> str:
        """End the run with this answer, or return why it cannot be taken, for the model."""
        try:
            answer = self._resolved(repl, final)
        except _Rejected as exc:
            return self._rejected(str(exc))
        raise _Stop("final", answer)

    def _rejected(self, reason: str) -> str:
        self._events.emit(AnswerRejected(step=self._step, reason=reason))
        return f"The answer was not taken: {reason}"

    def _resolved(self, repl: REPLProtocol, final: FinalAnswer) -> str:
        text = final.text.strip()
        if final.kind == "variable":
            return self._variable(repl, text)
        if not text:
            raise _Rejected("it is empty. Write the answer after FINAL:")
        # Models write FINAL: result and mean the variable. Only a name the session has is taken so.
        if text.isidentifier() and text not in _OWN_NAMES and text in (_quietly(repl.names) or {}):
            try:
                return self._variable(repl, text)
            except _Rejected:
                return text
        return text

    def _variable(self, repl: REPLProtocol, name: str) -> str:
        if not name.isidentifier():
            raise _Rejected(
                f"{name[:100]!r} is not the name of a variable. Assign the answer to one, or write FINAL: and the text."
            )
        if name in _OWN_NAMES:
            raise _Rejected(f"{name} belongs to the REPL and is no answer. Assign the answer to a variable of your own.")
        try:
            value = repl.get(name, _MISSING)
        except ValueError:  # None, True, a name with two underscores: nothing a session can have under that name
            raise _Rejected(
                f"{name[:100]} cannot be the name of a variable of yours. Assign the answer to one, or write FINAL: and the text."
            ) from None
        except (GuestError, LimitExceeded, GuestCrashed, ProtocolViolation) as exc:
            self._count_again(repl)
            raise _Rejected(f"{_called(name)} cannot be read ({type(exc).__name__}). Give a shorter text.") from exc
        if value is _MISSING:
            raise _Rejected(
                f"there is no variable named {name}. SHOW_VARS() lists yours; if this is the text of the answer, write FINAL: {name}"
            )
        if isinstance(value, Opaque):
            raise _Rejected(f"{_called(name)} holds an object ({value.type_name[:100]}) and no text. Use FINAL(str({name})).")
        if value is None or value == "":
            raise _Rejected(f"{_called(name)} is empty.")
        try:
            return value if isinstance(value, str) else str(value)
        except ValueError:  # Python writes no more than 4,300 digits
            raise _Rejected(f"{_called(name)} has too many digits to be written. Give a shorter text.") from None

    def _best_answer(self, repl: REPLProtocol, reason: StopReason) -> str:
        """What to return at a limit. Where replies ran out, and not tokens or time, the model is asked once more."""
        if reason not in ("max_steps", "max_empty_replies"):
            return self._best
        self._messages.append({"role": "user", "content": LAST_CHANCE})
        try:
            reply = parse_reply(self._ask().text)
        except (_Stop, AdapterError):
            return self._best
        if reply.final is None:
            return reply.prose or self._best
        try:
            return self._resolved(repl, reply.final)
        except _Rejected:
            return self._best


class _LiveOutput:
    """Passes a cell's output on as it appears, up to ``max_chars``, and keeps that much of it."""

    def __init__(self, events: EventStream, step: int, cell: int, max_chars: int | None) -> None:
        self._events = events
        self._step = step
        self._cell = cell
        self._left = max_chars
        self._seen: list[OutputChunk] = []

    def __call__(self, chunk: OutputChunk) -> None:
        text = chunk.text if self._left is None else chunk.text[: self._left]
        if not text:
            return
        if self._left is not None:
            self._left -= len(text)
        self._seen.append(OutputChunk(chunk.stream, text))
        self._events.emit(CellOutput(step=self._step, cell=self._cell, stream=chunk.stream, text=text))

    def text(self, stream: str) -> str:
        return "".join(chunk.text for chunk in self._seen if chunk.stream == stream)


def _called(name: str) -> str:
    return "the answer" if name == ANSWER_NAME else f"the variable {name}"


def _quietly(read: Callable[[], Any]) -> Any:
    """What ``read`` returns, or None where the guest fails it: it is only a hint."""
    try:
        return read()
    except (GuestError, LimitExceeded, GuestCrashed, ProtocolViolation):
        return None


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What ``ask`` returns or raises, if it ends in time. If not, its thread is left to itself: nothing can end it.

    An adapter that keeps to its ``seconds`` ends by itself at the same time, and says more.
    """
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((True, ask()))
        except BaseException as exc:  # noqa: BLE001 - carried to the thread that asked and raised there
            answers.put((False, exc))

    threading.Thread(target=work, name="rlm-sandbox-model", daemon=True).start()
    try:
        returned, value = take(answers, seconds + _GIVE_UP_SECONDS)
    except queue.Empty:
        raise _Stop("max_seconds") from None
    if not returned:
        raise value
    return value
