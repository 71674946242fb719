"""What happens in a run, as frozen records. Console, trajectory and `Trace` are listeners of the same stream.

Guest and model text in a record is raw: who renders it makes control characters inert.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Final, Literal

from ..results import LimitHit, Outcome, State, Stream, Usage

__all__ = (
    "AnswerRejected",
    "BatchFinished",
    "BatchStarted",
    "CellFinished",
    "CellOutput",
    "CellStarted",
    "Event",
    "EventStream",
    "Listener",
    "ModelReplied",
    "RunFinished",
    "RunStarted",
    "StepStarted",
    "StopReason",
    "SubcallFinished",
    "SubcallStarted",
    "excerpt",
)

log: Final = logging.getLogger("rlm_sandbox.events")

#: Characters of a sub-call's prompt and reply that an event keeps; the counts beside them are of the whole.
EXCERPT_CHARS: Final = 2_000

StopReason = Literal[
    "final", "max_steps", "max_empty_replies", "max_total_tokens", "max_seconds", "session_closed", "adapter_error",
    "interrupted", "error",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events. ``at`` is seconds since the epoch; ``kind`` is the stable name in a trajectory."""

    kind: ClassVar[str] = "event"
    at: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """The event as JSON-ready data: ``{"event": kind, "at": ..., field: value, ...}``. Field names are stable."""
        return {"event": self.kind, **{item.name: _jsonable(getattr(self, item.name)) for item in fields(self)}}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """First event of a run. ``limits`` and ``policy`` are the fields of `Limits` and `Policy` by name."""

    kind: ClassVar[str] = "run_started"
    run_id: str
    query: str
    context_chars: int
    context_documents: int
    model: str
    subcall_model: str
    backend: str
    isolation: str
    system_prompt: str
    limits: Mapping[str, Any]
    policy: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted(Event):
    """The root model is about to be asked. ``step`` counts from 1."""

    kind: ClassVar[str] = "step_started"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReplied(Event):
    """The root model's reply. ``seconds`` is how long it took, with the ``retries``: what each earlier attempt came to."""

    kind: ClassVar[str] = "model_replied"
    step: int
    text: str
    input_tokens: int
    output_tokens: int
    seconds: float
    finish_reason: str | None
    retries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CellStarted(Event):
    """A cell is about to run. ``cell`` counts from 1 over the whole run."""

    kind: ClassVar[str] = "cell_started"
    step: int
    cell: int
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CellOutput(Event):
    """Output as it appears, at most the session's ``output_bytes`` characters of it per cell. `CellFinished` repeats it."""

    kind: ClassVar[str] = "cell_output"
    step: int
    cell: int
    stream: Stream
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CellFinished(Event):
    """A cell's result: the fields of `ExecResult`, and ``seconds`` on the host's clock, recovery included."""

    kind: ClassVar[str] = "cell_finished"
    step: int
    cell: int
    outcome: Outcome
    stdout: str
    stderr: str
    value: str | None
    error: str | None
    traceback: str | None
    limit: LimitHit | None
    state: State
    lost_names: tuple[str, ...]
    dropped_bytes: int
    usage: Usage
    protected: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStarted(Event):
    """``llm_batch`` was called: ``size`` sub-calls follow, out of order. ``batch`` counts from 1 over the run."""

    kind: ClassVar[str] = "batch_started"
    step: int
    cell: int
    batch: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFinished(Event):
    """A batch is over: ``ok`` of its ``size`` sub-calls were answered."""

    kind: ClassVar[str] = "batch_finished"
    step: int
    cell: int
    batch: int
    size: int
    ok: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SubcallStarted(Event):
    """A sub-call goes out. ``subcall`` counts from 1 over the run.

    ``batch`` is None for ``llm_query``; otherwise ``index`` (from 0) is its place among the batch's ``size`` prompts.
    ``prompt`` is an excerpt, ``prompt_chars`` its whole length.
    """

    kind: ClassVar[str] = "subcall_started"
    step: int
    cell: int
    subcall: int
    batch: int | None
    index: int
    size: int
    model: str
    prompt: str
    prompt_chars: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SubcallFinished(Event):
    """A sub-call came back, or failed: then ``error`` says why and ``response`` is empty.

    ``retries``: what each attempt before the last came to.
    """

    kind: ClassVar[str] = "subcall_finished"
    step: int
    cell: int
    subcall: int
    batch: int | None
    index: int
    size: int
    response: str
    response_chars: int
    error: str | None
    input_tokens: int
    output_tokens: int
    seconds: float
    retries: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when the sub-call was answered."""
        return self.error is None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRejected(Event):
    """The model's final answer could not be taken (an unknown variable, say); ``reason`` went back to it."""

    kind: ClassVar[str] = "answer_rejected"
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """Last event of a run, whatever ended it.

    ``verified`` is true when the model gave the answer itself; otherwise ``answer`` is the best one so far.
    ``error`` has the exception's sentence where one ended the run.
    """

    kind: ClassVar[str] = "run_finished"
    answer: str
    verified: bool
    stop_reason: StopReason
    error: str | None
    steps: int
    cells: int
    subcalls: int
    input_tokens: int
    output_tokens: int
    seconds: float


Listener = Callable[[Event], object]


class EventStream:
    """Hands each event to every listener, one event at a time, in one order for all of them.

    A listener that raises is logged and keeps being called: it must not end the run nor silence the others. After
    `close`, events are dropped: a sub-call that outlived its run has nothing more to say.
    """

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._listeners = tuple(listeners)
        # Re-entrant: a listener may itself call something that emits.
        self._lock = threading.RLock()
        self._closed = False

    def emit(self, event: Event) -> None:
        """Hand ``event`` to every listener. Raises only what is not an `Exception` (Ctrl-C)."""
        with self._lock:
            if self._closed:
                return
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:
                    log.exception("listener %r failed on %s", listener, event.kind)

    def close(self) -> None:
        """Drop every later event."""
        with self._lock:
            self._closed = True


def excerpt(text: str, limit: int = EXCERPT_CHARS) -> str:
    """The beginning and the end of ``text`` in about ``limit`` characters, with the count of what lies between."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]}\n[... {len(text) - limit} characters not shown ...]\n{text[-tail:]}"


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _jsonable(item) for name, item in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
