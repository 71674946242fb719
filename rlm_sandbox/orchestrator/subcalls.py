"""``llm_query`` and ``llm_batch``: what a cell calls, on the host. Budgets are enforced here, during the cell."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import SandboxError
from ..waiting import piece
from .events import BatchFinished, BatchStarted, EventStream, SubcallFinished, SubcallStarted, excerpt
from .ledger import Ledger, Reservation
from .llm import AdapterError, AdapterErrorKind, Completion, LLMAdapter, Message, TokenUsage
from .policy import Policy, PolicyExceeded

__all__ = ("GUEST_ERRORS", "SubcallDesk", "SubcallFailed")

log: Final = logging.getLogger("rlm_sandbox.subcalls")

#: What a guest reads about a failed sub-call: our words by kind, never the adapter's, which may name hosts.
_REASONS: Final[dict[AdapterErrorKind, str]] = {
    "auth": "the model is not accessible",
    "model": "there is no such model",
    "connection": "the model cannot be reached",
    "timeout": "the model did not answer in time",
    "rate_limit": "the model's rate limit was hit; wait or use fewer prompts",
    "request": "the model refused the request; the prompt may be too long",
    "server": "the model's server failed",
    "response": "the model gave no usable answer; reword the prompt",
    "script": "no reply is scripted for this prompt",
}
_OTHER_REASON: Final = "the call failed"
#: Seconds between looks at whether a cell that waits for a free place has ended.
_WAIT_SECONDS: Final = 0.2


class SubcallFailed(SandboxError):
    """A sub-call failed or was malformed. Raised in the guest, message and all. The session is usable."""


#: For ``bind(..., errors=...)``: these messages are written for the model.
GUEST_ERRORS: Final = (PolicyExceeded, SubcallFailed)


@dataclass(frozen=True, slots=True)
class _Cell:
    """The cell on whose behalf calls are made. A new object for each cell: a call compares identity."""

    step: int
    number: int
    ends: float | None
    """When it is over at the latest, on the monotonic clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subcall:
    cell: _Cell
    number: int
    batch: int | None
    index: int
    size: int
    started: float


@dataclass(frozen=True, slots=True)
class _Answer:
    """A reply, or the reason there is none. ``retries``: what each attempt before it came to."""

    text: str
    failed: bool = False
    retries: tuple[str, ...] = ()


_NOT_MADE: Final = _Answer("not made: the cell ended or the run's time is used up", failed=True)


class SubcallDesk:
    """Makes a run's sub-calls, from any number of threads at once.

    When a cell has ended, calls it still has under way are reported as abandoned, those that wait are not made: a
    killed cell spends nothing more.
    """

    def __init__(self, adapter: LLMAdapter, policy: Policy, ledger: Ledger, events: EventStream) -> None:
        self._adapter = adapter
        self._policy = policy
        self._ledger = ledger
        self._events = events
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(policy.max_concurrent_subcalls)
        self._cell: _Cell | None = None
        self._under_way: dict[int, _Subcall] = {}
        self._subcalls = 0
        self._batches = 0

    @property
    def made(self) -> int:
        """Sub-calls that went out so far."""
        with self._lock:
            return self._subcalls

    def begin_cell(self, step: int, cell: int, seconds: float | None = None) -> None:
        """Calls from now on belong to this cell, which is over in ``seconds`` at the latest."""
        with self._lock:
            self._cell = _Cell(step, cell, None if seconds is None else time.monotonic() + seconds)

    def end_cell(self) -> None:
        """The cell is over: nothing more goes out for it."""
        with self._lock:
            self._cell = None
            abandoned = list(self._under_way.values())
            self._under_way.clear()
        for call in abandoned:
            self._report(call, _Answer("abandoned: the cell ended first", failed=True), TokenUsage())

    # ---- what the guest calls

    def llm_query(self, prompt: str, model: str | None = None, max_tokens: int | None = None) -> str:
        """Ask the sub-model one thing.

        Raises:
            PolicyExceeded, SubcallFailed: with a message for the model.
        """
        if not isinstance(prompt, str):
            raise SubcallFailed(f"llm_query takes one prompt as a str, not {type(prompt).__name__}; llm_batch takes a list")
        cell, reserved = self._admit([prompt], model, max_tokens)
        answer = self._ask(cell, prompt, model, reserved[0], None, 0, 1)
        if answer.failed:
            raise SubcallFailed(f"sub-call failed: {answer.text}")
        return answer.text

    def llm_batch(self, prompts: Sequence[str], model: str | None = None, max_tokens: int | None = None) -> list[str]:
        """Ask the sub-model many things at once; answers come in the order of the prompts.

        A failed one leaves ``"Error: sub-call failed: ..."`` in its place and the others their answers.

        Raises:
            PolicyExceeded: the budget does not cover the whole batch; none was sent.
            SubcallFailed: every one failed, or the prompts are malformed.
        """
        if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
            raise SubcallFailed("llm_batch takes a list of prompts, each a str")
        if not prompts:
            return []
        cell, reserved = self._admit(prompts, model, max_tokens)
        with self._lock:
            self._batches += 1
            batch = self._batches
        size, started = len(prompts), time.monotonic()
        self._events.emit(BatchStarted(step=cell.step, cell=cell.number, batch=batch, size=size))
        answers: list[_Answer] = [_NOT_MADE] * size
        remaining = iter(range(size))

        def work() -> None:
            while True:
                with self._lock:
                    index = next(remaining, None)
                if index is None:
                    return
                answers[index] = self._ask(cell, prompts[index], model, reserved[index], batch, index, size)

        # Daemon threads and no executor: an executor's threads are joined when the process ends, and one model that
        # never answers would hold that up.
        count = min(size, self._policy.max_concurrent_subcalls)
        threads = [threading.Thread(target=work, name="rlm-sandbox-subcall", daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(piece(None))
        answered = sum(not answer.failed for answer in answers)
        if self._is_current(cell):
            self._events.emit(
                BatchFinished(
                    step=cell.step, cell=cell.number, batch=batch, size=size, ok=answered, seconds=time.monotonic() - started
                )
            )
        if not answered:
            raise SubcallFailed(f"all {size} sub-calls failed; the first: {answers[0].text}")
        return [f"Error: sub-call failed: {answer.text}" if answer.failed else answer.text for answer in answers]

    # ---- how

    def _admit(self, prompts: Sequence[str], model: Any, max_tokens: Any) -> tuple[_Cell, list[Reservation]]:
        """Check what the guest asked for and take it from the budgets."""
        if model is not None and model != self._adapter.model and model not in self._policy.subcall_models:
            listed = ", ".join((self._adapter.model, *self._policy.subcall_models))
            raise SubcallFailed(f"this model is not allowed for sub-calls; leave model out, or choose from: {listed}")
        if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
            raise SubcallFailed("max_tokens must be a whole number above 0")
        with self._lock:
            cell = self._cell
        if cell is None:
            raise SubcallFailed("sub-calls can only be made while a cell runs")
        return cell, self._ledger.reserve_subcalls(prompts, max_tokens)

    def _is_current(self, cell: _Cell) -> bool:
        return self._cell is cell

    def _ask(
        self, cell: _Cell, prompt: str, model: str | None, reserved: Reservation, batch: int | None, index: int, size: int
    ) -> _Answer:
        """One sub-call, from waiting for a place to its report."""
        if not self._got_place(cell):
            self._ledger.release(reserved)
            return _NOT_MADE
        try:
            call = self._begin(cell, prompt, model, batch, index, size)
            if call is None:
                self._ledger.release(reserved)
                return _NOT_MADE
            answer, usage = _Answer(_OTHER_REASON, failed=True), TokenUsage()
            try:
                answer, usage = self._complete(cell, prompt, model, reserved)
            finally:
                self._ledger.settle(reserved, usage)
                with self._lock:
                    abandoned = self._under_way.pop(call.number, None) is None
                if not abandoned:
                    self._report(call, answer, usage)
            return answer
        finally:
            self._places.release()

    def _got_place(self, cell: _Cell) -> bool:
        while self._is_current(cell):
            if self._places.acquire(timeout=_WAIT_SECONDS):
                return True
        return False

    def _begin(self, cell: _Cell, prompt: str, model: str | None, batch: int | None, index: int, size: int) -> _Subcall | None:
        """Announce a sub-call, or None if it must not be made any more."""
        if self._ledger.seconds_left == 0:
            return None
        with self._lock:
            if self._cell is not cell:
                return None
            self._subcalls += 1
            call = _Subcall(cell=cell, number=self._subcalls, batch=batch, index=index, size=size, started=time.monotonic())
            self._under_way[call.number] = call
            # Under the lock, so that `end_cell` cannot report the end of a call before its start.
            self._events.emit(
                SubcallStarted(
                    step=cell.step, cell=cell.number, subcall=call.number, batch=batch, index=index, size=size,
                    model=model or self._adapter.model, prompt=excerpt(prompt), prompt_chars=len(prompt),
                )
            )  # fmt: skip
        return call

    def _complete(self, cell: _Cell, prompt: str, model: str | None, reserved: Reservation) -> tuple[_Answer, TokenUsage]:
        # The adapter retries; it must not go on doing so for a cell that is over.
        seconds = None if cell.ends is None else max(0.001, cell.ends - time.monotonic())
        messages: list[Message] = [{"role": "user", "content": prompt}]
        try:
            reply = self._adapter.complete(messages, model=model, max_tokens=reserved.max_tokens, seconds=seconds)
        except AdapterError as exc:
            log.info("sub-call failed: %s", exc)
            return _Answer(_REASONS.get(exc.kind, _OTHER_REASON), failed=True, retries=exc.retries), TokenUsage()
        except Exception:
            log.exception("the adapter raised something that is not an AdapterError")
            return _Answer(_OTHER_REASON, failed=True), TokenUsage()
        if not isinstance(reply, Completion) or not isinstance(reply.text, str):
            log.error("the adapter returned %r and not a Completion with a text", type(reply).__name__)
            return _Answer(_OTHER_REASON, failed=True), TokenUsage()
        return _Answer(reply.text, retries=reply.retries), reply.usage

    def _report(self, call: _Subcall, answer: _Answer, usage: TokenUsage) -> None:
        self._events.emit(
            SubcallFinished(
                step=call.cell.step, cell=call.cell.number, subcall=call.number, batch=call.batch, index=call.index,
                size=call.size, response="" if answer.failed else excerpt(answer.text),
                response_chars=0 if answer.failed else len(answer.text), error=answer.text if answer.failed else None,
                input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, seconds=time.monotonic() - call.started,
                retries=answer.retries,
            )
        )  # fmt: skip
