"""The doctor's own logic: what counts as usable, what is shown, and what becomes of an examination that hangs or dies."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import rlm_sandbox.cli as cli
from rlm_sandbox import BackendUnavailable, Capabilities, ExecResult, Grade, LimitHit
from rlm_sandbox.diagnosis import Finding, Status, child, sessions
from rlm_sandbox.doctor import Diagnosis, render
from rlm_sandbox.options import BackendOptions
from rlm_sandbox.registry import Availability
from rlm_sandbox.testing import FakeREPL

GOOD = Finding(backend="jail", layer="cell", status=Status.PASS, found="ran", consequence="Code runs.")
BAD = replace(GOOD, layer="memory", status=Status.FAIL, found="\x1b[31mred\u202e", remedy=f"run: {'x' * 200}\x07")


def _shown(diagnosis: Diagnosis, *, terminal: bool = False, width: int = 60) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)
    render(diagnosis, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_usable_is_what_auto_opens_and_nothing_of_it_failed() -> None:
    works = Diagnosis(findings=(GOOD,), auto="jail", auto_error="")
    assert works.usable
    assert not replace(works, findings=(GOOD, BAD)).usable
    assert replace(works, findings=(GOOD, replace(BAD, backend="other"))).usable
    assert not replace(works, auto=None, auto_error="no kernel").usable


def test_what_is_shown_is_inert_and_remedies_can_be_copied() -> None:
    text = _shown(Diagnosis(findings=(GOOD, BAD), auto=None, auto_error="no \x1b]0;title\x07 kernel"))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\x07" not in text
    assert f"  run: {'x' * 200}\\x07\n    for jail, memory\n" in text
    assert text.endswith("auto has no usable backend: no \\x1b]0;title\\x07 kernel\n")


@pytest.mark.parametrize("width", [20, 60, 300])
def test_a_terminal_of_any_width(width: int) -> None:
    text = _shown(Diagnosis(findings=(GOOD, BAD), auto="jail", auto_error=""), terminal=True, width=width)
    assert "PASS" in text
    assert "do not rely on it" in text


@pytest.mark.parametrize("usable", [True, False])
def test_the_exit_status_is_about_auto(monkeypatch: pytest.MonkeyPatch, usable: bool) -> None:
    diagnosis = Diagnosis(findings=(GOOD,) if usable else (GOOD, BAD), auto="jail", auto_error="")
    monkeypatch.setattr("rlm_sandbox.doctor.diagnose", lambda _progress: diagnosis)
    done = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert done.exit_code == (0 if usable else 1)
    report = json.loads(done.stdout)
    assert (report["schema"], report["usable"], report["auto"], report["auto_error"]) == (1, usable, "jail", None)
    assert report["findings"][0] == {
        "backend": "jail", "layer": "cell", "status": "PASS", "found": "ran", "consequence": "Code runs.", "remedy": "",
    }  # fmt: skip
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == (0 if usable else 1)
    assert "auto opens jail" in done.stdout


def _child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(child, "_START", f"import json, sys, time, os\nprint({json.dumps(GOOD.to_json())!r}, flush=True)\n{code}")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("time.sleep(60)", "it did not end within 0.4 s; the last that was tried with an end: cell"),
        ("os.kill(os.getpid(), 9)", "ended with status -9"),
        ("print('{\"backend\": 1}')", "it printed what is no finding"),
        ("print('\\xff' * 10, '[]')", "it printed what is no finding"),
    ],
)
def test_an_examination_that_fails_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    _child(monkeypatch, code)
    first, last = child.examine("jail", "layers", seconds=0.4 if "sleep" in code else 10)
    assert first == GOOD
    assert last.status is Status.FAIL
    assert words in last.found


def test_auto_cannot_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    _child(monkeypatch, "sys.exit(3)")
    assert child.choose_auto() == (None, "the process that tried it ended with status 3")


class _Backend:
    """A backend as a third party might add one."""

    def __init__(self, usable: bool = True, **changes: Any) -> None:
        self.usable = usable
        self.changes = changes

    def probe(self, options: BackendOptions | None = None) -> Availability:
        return Availability(self.usable, "" if self.usable else "no engine", "" if self.usable else "run: rlm-sandbox doctor")

    def capabilities(self, _config: object) -> Capabilities:
        grades = dict.fromkeys(
            (
                "time_seconds", "wall_seconds", "output_bytes", "host_calls", "value_bytes", "memory_mb", "processes", "disk_mb",
                "session_seconds", "network", "crash", "interrupt",
            ),
            Grade.HARD,
        )  # fmt: skip
        return Capabilities(backend="new", isolation="none", **{**grades, **self.changes})

    def open(self, _config: object) -> FakeREPL:
        return FakeREPL()


class _Answers(FakeREPL):
    """Answers as told, whatever it is asked."""

    def __init__(self, *results: ExecResult) -> None:
        super().__init__()
        self.results = list(results)

    def exec(self, code: str, **_: Any) -> ExecResult:
        return self.results.pop(0)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    def run(backend: _Backend, *results: ExecResult) -> dict[str, Finding]:
        monkeypatch.setattr(sessions, "load_backend", lambda _name: backend)
        monkeypatch.setattr(sessions, "open_repl", lambda *_args, **_options: _Answers(*results))
        return {item.layer: item for item in sessions.examine_backend("new")}

    return run


CELL = ExecResult(outcome="ok", value="42")
HIT = LimitHit("time_seconds", 0.5, 0.5, "host")
STOPPED = ExecResult(outcome="limit", limit=HIT, state="restored")
TWO = ExecResult(outcome="ok", value="2")
OUT_OF_MEMORY = ExecResult(outcome="error", error="MemoryError: ")


def test_a_backend_nobody_knows_is_tried_like_any_other(examined: Callable[..., dict[str, Finding]]) -> None:
    found = examined(_Backend(), CELL, STOPPED, CELL, OUT_OF_MEMORY, TWO)
    assert list(found) == ["package", "start", "session", "cell", "kill", "memory", "limits"]
    assert {item.status for item in found.values()} == {Status.PASS}


@pytest.mark.parametrize(
    ("results", "layer", "words"),
    [
        ([ExecResult(outcome="ok", value="41")], "cell", "came to ok '41'"),
        ([CELL, replace(STOPPED, outcome="ok", limit=None), CELL, OUT_OF_MEMORY, TWO], "kill", "endless call came to ok"),
        ([CELL, STOPPED, replace(CELL, value="0"), OUT_OF_MEMORY, TWO], "kill", "then the variable is 0"),
        ([CELL, replace(STOPPED, state="lost"), TWO, OUT_OF_MEMORY, TWO], "kill", "state lost"),
        ([CELL, STOPPED, CELL, TWO, TWO], "memory", "a list of 2 GiB came to ok"),
    ],
)
def test_what_does_not_hold_fails(
    examined: Callable[..., dict[str, Finding]], results: list[ExecResult], layer: str, words: str
) -> None:
    found = examined(_Backend(recovery="standby"), *results)[layer]
    assert found.status is Status.FAIL
    assert words in found.found


def test_what_is_not_promised_is_a_caution(examined: Callable[..., dict[str, Finding]]) -> None:
    found = examined(_Backend(), CELL, replace(STOPPED, state="lost"), TWO, OUT_OF_MEMORY, TWO)
    assert found["kill"].status is Status.CAUTION
    found = examined(_Backend(time_seconds=Grade.NONE, memory_mb=Grade.NONE), CELL)
    assert {found[name].status for name in ("kill", "memory")} == {Status.SKIPPED}
    assert found["limits"].status is Status.CAUTION
    assert found["limits"].found == "time_seconds (NONE), memory_mb (NONE)"


def test_a_backend_that_is_not_usable(examined: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(_Backend(usable=False))
    assert list(found) == ["package", "start"]
    assert (found["start"].found, found["start"].remedy) == ("no engine", "see the layers above")

    def absent(_name: str) -> Any:
        raise BackendUnavailable("new", "the package new is not installed", "run: pip install 'rlm-sandbox[new]'")

    monkeypatch.setattr(sessions, "load_backend", absent)
    (only,) = sessions.examine_backend("new")
    assert (only.layer, only.status, only.remedy) == ("package", Status.FAIL, "run: pip install 'rlm-sandbox[new]'")


def test_a_finding_crosses_as_json() -> None:
    assert Finding.from_json(json.loads(json.dumps(BAD.to_json()))) == BAD
    with pytest.raises(ValueError, match="MAYBE"):
        Finding.from_json({**GOOD.to_json(), "status": "MAYBE"})
