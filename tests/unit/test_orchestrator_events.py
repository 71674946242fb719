"""Events, the stream that hands them out, the trace and the trajectory file."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from rlm_sandbox import JsonlWriter, LimitHit, Trace, Usage
from rlm_sandbox.orchestrator import events
from rlm_sandbox.orchestrator.events import CellFinished, CellOutput, Event, EventStream, RunFinished, StepStarted, excerpt
from rlm_sandbox.trajectory import SCHEMA_VERSION

CELL = CellFinished(
    at=1.5, step=1, cell=2, outcome="limit", stdout="a\x1b[31m\ud800", stderr="", value=None, error=None, traceback=None,
    limit=LimitHit("time_seconds", 10.0, float("inf"), "kernel"), state="restored", lost_names=("x",), dropped_bytes=0,
    usage=Usage(time_seconds=1.0), protected=True, seconds=2.0,
)  # fmt: skip
END = RunFinished(
    answer="42", verified=True, stop_reason="final", error=None, steps=2, cells=2, subcalls=3, input_tokens=5,
    output_tokens=7, seconds=1.25,
)  # fmt: skip


def concrete() -> list[type[Event]]:
    return [
        item
        for item in vars(events).values()
        if isinstance(item, type) and issubclass(item, Event) and item.__name__ in events.__all__
    ]


def test_every_event_is_frozen_and_has_a_kind_of_its_own() -> None:
    kinds = [cls.kind for cls in concrete()]
    assert len(set(kinds)) == len(kinds) > 12
    for cls in concrete():
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        CELL.step = 3  # type: ignore[misc]


def test_json_form() -> None:
    found = CELL.to_json()
    assert list(found)[:4] == ["event", "at", "step", "cell"]
    assert found["event"] == "cell_finished"
    assert found["limit"] == {"kind": "time_seconds", "limit": 10.0, "observed": "inf", "source": "kernel"}
    assert found["usage"]["time_seconds"] == 1.0
    assert found["lost_names"] == ["x"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_listeners_are_called_in_order_and_one_that_fails_silences_nobody(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    def broken(event: Event) -> None:
        seen.append("broken")
        raise RuntimeError("no")

    stream = EventStream([broken, seen.append])
    first, second = StepStarted(step=1), StepStarted(step=2)
    with caplog.at_level(logging.ERROR):
        stream.emit(first)
        stream.emit(second)
    assert seen == ["broken", first, "broken", second]
    assert "failed on step_started" in caplog.text


def test_ctrl_c_in_a_listener_is_not_swallowed() -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EventStream([interrupted]).emit(StepStarted(step=1))


def test_after_the_end_nothing_is_said() -> None:
    seen: list[Event] = []
    stream = EventStream([seen.append])
    stream.close()
    stream.emit(StepStarted(step=1))
    assert seen == []


def test_one_event_at_a_time_from_many_threads() -> None:
    inside = 0
    worst = 0

    def listener(event: Event) -> None:
        nonlocal inside, worst
        inside += 1
        worst = max(worst, inside)
        inside -= 1

    stream = EventStream([listener])

    def emit() -> None:
        for step in range(200):
            stream.emit(StepStarted(step=step))

    threads = [threading.Thread(target=emit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1


def test_trace() -> None:
    trace = Trace()
    assert (trace.answer, trace.verified, trace.stop_reason, trace.total_tokens, trace.seconds) == ("", False, None, 0, 0.0)
    for event in (StepStarted(step=1), CellOutput(step=1, cell=1, stream="stdout", text="x"), CELL, END):
        trace(event)
    assert len(trace) == 3
    assert trace.cells == (CELL,)
    assert (trace.answer, trace.verified, trace.stop_reason, trace.total_tokens, trace.steps) == ("42", True, "final", 12, 2)
    assert [item["event"] for item in trace.to_json()] == ["step_started", "cell_finished", "run_finished"]


def test_trajectory_file_is_written_through(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with JsonlWriter(path) as writer:
        writer(CELL)
        writer(CellOutput(step=1, cell=1, stream="stdout", text="x"))
        raw = path.read_bytes()  # before it is closed: a killed process leaves this much
        assert raw.endswith(b"}\n")
        assert raw.isascii()
        assert b"\x1b" not in raw
        writer(END)
    writer(END)
    lines = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    assert [line["event"] for line in lines] == ["cell_finished", "run_finished"]
    assert {line["schema"] for line in lines} == {SCHEMA_VERSION}
    assert lines[0]["stdout"] == "a\x1b[31m\ud800"


def test_a_file_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JsonlWriter(tmp_path / "no" / "run.jsonl")


def test_excerpt() -> None:
    assert excerpt("short") == "short"
    cut = excerpt("a" * 5_000 + "z" * 5_000, 300)
    assert cut.startswith("a" * 200)
    assert cut.endswith("z" * 100)
    assert "9700 characters" in cut
