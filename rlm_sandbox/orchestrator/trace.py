"""`Trace`: a run as it went, for code. A listener that collects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from .events import CellFinished, CellOutput, Event, ModelReplied, RunFinished, RunStarted, StopReason, SubcallFinished

__all__ = ("Trace",)

_E = TypeVar("_E", bound=Event)


class Trace:
    """The events of a run in order, without `CellOutput` (`CellFinished` has the text).

    ``answer``, ``verified``, ``stop_reason`` and the totals are those of the `RunFinished` event; before it, they are
    empty. One trace may collect one run.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Collect ``event``."""
        if not isinstance(event, CellOutput):
            self._events.append(event)

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything collected so far."""
        return tuple(self._events)

    def of(self, kind: type[_E]) -> tuple[_E, ...]:
        """The events of one class, in order."""
        return tuple(event for event in self._events if isinstance(event, kind))

    @property
    def started(self) -> RunStarted | None:
        """The run's first event."""
        return next(iter(self.of(RunStarted)), None)

    @property
    def finished(self) -> RunFinished | None:
        """The run's last event, with answer and totals."""
        return next(iter(self.of(RunFinished)), None)

    @property
    def replies(self) -> tuple[ModelReplied, ...]:
        """The root model's replies."""
        return self.of(ModelReplied)

    @property
    def cells(self) -> tuple[CellFinished, ...]:
        """The results of the cells."""
        return self.of(CellFinished)

    @property
    def subcalls(self) -> tuple[SubcallFinished, ...]:
        """The sub-calls that came back or failed."""
        return self.of(SubcallFinished)

    @property
    def answer(self) -> str:
        """The run's answer, or ``""``."""
        return self.finished.answer if self.finished else ""

    @property
    def verified(self) -> bool:
        """True when the model gave the answer itself; False when a limit cut it short."""
        return self.finished is not None and self.finished.verified

    @property
    def stop_reason(self) -> StopReason | None:
        """What ended the run, or None while it goes on."""
        return self.finished.stop_reason if self.finished else None

    @property
    def steps(self) -> int:
        """Replies of the root model that count against ``max_steps``."""
        return self.finished.steps if self.finished else len(self.replies)

    @property
    def total_tokens(self) -> int:
        """Input and output tokens of the root model and of all sub-calls."""
        return self.finished.input_tokens + self.finished.output_tokens if self.finished else 0

    @property
    def seconds(self) -> float:
        """How long the run took."""
        return self.finished.seconds if self.finished else 0.0

    def to_json(self) -> list[dict[str, Any]]:
        """The events as JSON-ready data, as a trajectory file has them."""
        return [event.to_json() for event in self._events]
