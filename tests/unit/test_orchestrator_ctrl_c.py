"""Ctrl-C in a run, wherever it comes: the run ends, its listeners have the end, its session is closed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from rlm_sandbox import RLM, Completion, ExecResult, FakeAdapter, Policy
from rlm_sandbox.testing import FakeREPL

from ..ctrl_c import unseen_ctrl_c
from .test_orchestrator_loop import Scenario, cell


def test_ctrl_c_in_a_cell(tmp_path: Path) -> None:
    class Interrupting(FakeREPL):
        def exec(self, code: str, **options: Any) -> ExecResult:
            super().exec(code, **options)
            raise KeyboardInterrupt

    scenario = Scenario(cell("print('seen so far')"), factory=Interrupting)
    with pytest.raises(KeyboardInterrupt):
        scenario.run()
    kinds = [event.kind for event in scenario.events]
    assert kinds[-3:] == ["cell_output", "cell_finished", "run_finished"] or kinds[-2:] == ["cell_finished", "run_finished"]
    finished = scenario.events[-2]
    assert finished.to_json()["outcome"] == "interrupted"
    assert "seen so far" in finished.to_json()["stdout"]
    assert scenario.end.stop_reason == "interrupted"
    assert scenario.sessions[0]._closed


def test_ctrl_c_while_the_model_thinks() -> None:
    scenario = Scenario(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        scenario.run()
    assert scenario.end.stop_reason == "interrupted"


def test_ctrl_c_that_does_not_end_the_wait_for_the_model_is_noticed_all_the_same() -> None:
    never = threading.Event()

    class Endless(FakeAdapter):
        def complete(self, *_: Any, **__: Any) -> Completion:
            press()
            never.wait(120)
            return Completion("late")

    with unseen_ctrl_c() as press:
        RLM(Endless([]), repl_factory=FakeREPL, policy=Policy(max_seconds=100)).run("q", "t")
    never.set()
