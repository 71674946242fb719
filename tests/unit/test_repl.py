"""The prompt's parts: where cells end, what is typed and completed, what is shown, what Ctrl-C does. No sandbox."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from typer.testing import CliRunner

import rlm_sandbox.cli as cli
from rlm_sandbox import BackendUnavailable, ExecResult, GuestCrashed, LimitHit, OutputChunk, SessionClosed
from rlm_sandbox.repl.cells import ends_cell, is_complete, next_indent, split_cells
from rlm_sandbox.repl.prompt import NameCompleter, Prompt, open_history
from rlm_sandbox.repl.screen import Screen
from rlm_sandbox.repl.shell import Shell
from rlm_sandbox.testing import FakeREPL


@pytest.mark.parametrize(
    ("code", "complete", "ends"),
    [
        ("1 + 1", True, True),
        ("f(", False, False),
        ("'''text", False, False),
        ("x = (\n1,\n)", True, True),
        ("if x:", False, False),
        ("if x:\n    y()", True, False),
        ("if x:\n    y()\n", True, True),
        ("if x:\n    y()\n    ", True, True),
        ("def f(): return 1", True, True),
        ("@decorated", False, False),
        ("await something()", True, True),
        ("1 +* 2", True, True),
        ("x = '", True, True),
        ("a\x00b", True, True),
        ("\ud800", True, True),
        ("(" * 5_000, True, True),
        ("'''" + "x" * 70_000, True, True),
        ("x = \\", False, False),
    ],
)
def test_where_a_cell_ends(code: str, complete: bool, ends: bool) -> None:
    assert (is_complete(code), ends_cell(code)) == (complete, ends)


def test_indentation() -> None:
    assert next_indent("if x:") == "    "
    assert next_indent("if x:\n    for y in z:  ") == "        "
    assert next_indent("if x:\n    y()") == "    "
    assert next_indent("x") == ""


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("", []),
        ("\n\n  \n", []),
        ("x = 1\nx\n", ["x = 1\nx"]),
        ("x = 1\n\n\nx\n\n", ["x = 1", "x"]),
        ("def f():\n    a\n\n    b\n\nf()", ["def f():\n    a\n\n    b", "f()"]),
        ("try:\n    a\n\nexcept E:\n    b\n\nc", ["try:\n    a\n\nexcept E:\n    b", "c"]),
        ("s = '''a\n\nb'''\n\ns", ["s = '''a\n\nb'''", "s"]),
        ("f(\n\n1)\n\nx", ["f(\n\n1)", "x"]),
        ("1 +* 2\n\nx", ["1 +* 2", "x"]),
        ("else_ = 1\n\nelsewhere = 2", ["else_ = 1", "elsewhere = 2"]),
        ("s = '''never\n\nclosed\n\nx", ["s = '''never\n\nclosed\n\nx"]),
        ("x = 1\r\n\r\nx\r\n", ["x = 1\r", "x\r"]),
    ],
)
def test_piped_text_is_cut_into_cells(text: str, cells: list[str]) -> None:
    assert split_cells(text) == cells


def test_a_long_text_is_cut_in_good_time() -> None:
    started = time.monotonic()
    assert split_cells("s = '''\n\n" + "x\n\n" * 200_000)
    assert time.monotonic() - started < 60  # one pass over the lines; a quadratic one takes hours


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


Typed = Callable[..., str]


@pytest.fixture
def typed(keys: PipeInput) -> Typed:
    def read(text: str, names: frozenset[str] = frozenset()) -> str:
        keys.send_text(text)
        return Prompt(InMemoryHistory(), input=keys, output=DummyOutput()).read(names)

    return read


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("1 + 1\r", "1 + 1"),
        ("if x:\ry()\r\r", "if x:\n    y()\n    "),
        ("f(\r1)\r", "f(\n1)"),
        ("if x:\r\ty()\r\x7fz()\r", "if x:\n        y()\n    z()\n    "),
        ("if x:\r\x7fz()\r", "if x:\nz()"),
        ("a\x7fb\r", "b"),
        ("\x1b[200~x = 1\ny = 2\x1b[201~\r", "x = 1\ny = 2"),
    ],
)
def test_typing(typed: Typed, text: str, cell: str) -> None:
    if "\x7fz()\r" in text and cell.endswith("    "):
        text += "\r"
    assert typed(text) == cell


def test_tab_completes(typed: Typed) -> None:
    assert typed("need\t + 1\r", frozenset({"needle", "other"})) == "needle + 1"
    assert typed("x.need\t\r", frozenset({"needle"})) == "x.need"


def test_ctrl_d_and_ctrl_c(typed: Typed) -> None:
    with pytest.raises(EOFError):
        typed("\x04")
    with pytest.raises(KeyboardInterrupt):
        typed("half a line\x03")


def _completions(text: str, *names: str) -> list[str]:
    completer = NameCompleter()
    completer.names = frozenset(names)
    return [item.text for item in completer.get_completions(Document(text), CompleteEvent())]


def test_completions() -> None:
    assert _completions("x = nee", "needle", "need", "other") == ["need", "needle"]
    assert _completions("whi") == ["while"]
    assert "print" in _completions("pri")
    assert _completions("ctx.ch") == ["chunk", "chunk_documents"]
    assert _completions("needle.f", "needle", "f") == []
    assert _completions("f(", "needle") == []
    assert _completions("", "needle") == []


def test_history_is_for_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    history = open_history()
    assert isinstance(history, FileHistory)
    history.append_string("secret = 1")
    path = tmp_path / "state" / "rlm-sandbox" / "repl_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    open_history()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert isinstance(open_history(), InMemoryHistory)
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/nowhere")
    assert isinstance(open_history(), InMemoryHistory)


class _Shown:
    """A screen and what was put on it."""

    def __init__(self, **options: Any) -> None:
        self.out = Console(file=io.StringIO(), highlight=False, **options)
        self.err = Console(file=io.StringIO(), highlight=False, **options)
        self.screen = Screen(self.out, self.err)

    @staticmethod
    def _text(console: Console) -> str:
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    @property
    def texts(self) -> tuple[str, str]:
        return self._text(self.out), self._text(self.err)


HOSTILE = "\x1b[2J\x1b]0;t\x07\r\x08\u202e\u200b[bold]"


def test_nothing_of_a_guest_acts_on_the_terminal() -> None:
    shown = _Shown()
    for stream in ("stdout", "stderr"):
        shown.screen.output(OutputChunk(stream, HOSTILE))
    hit = LimitHit("memory_mb", 5, 6.0, "kernel")
    for result in (
        ExecResult(outcome="ok", value=HOSTILE),
        ExecResult(outcome="error", error=HOSTILE, traceback=HOSTILE),
        ExecResult(outcome="crashed", error=HOSTILE, state="lost", lost_names=(HOSTILE,)),
        ExecResult(outcome="limit", limit=hit, state="restored"),
    ):
        shown.screen.result(result)
    shown.screen.notice(HOSTILE)
    text = "".join(shown.texts)
    assert not set(text) & set("\x1b\x07\r\x08\u202e\u200b")
    assert text.count("[bold]") >= 7
    assert "limit hit: memory_mb of 5, observed 6 (measured by the kernel)\nstate restored" in text
    assert "state lost: the session starts again without its variables (" in text


def test_output_and_results_keep_to_their_streams_and_lines() -> None:
    shown = _Shown()
    shown.screen.begin_cell(10)
    shown.screen.output(OutputChunk("stdout", "12345"))
    shown.screen.output(OutputChunk("stderr", "67"))
    shown.screen.output(OutputChunk("stdout", "89012345"))
    shown.screen.result(ExecResult(outcome="ok", value="'v'", dropped_bytes=5))
    assert shown.texts == ("12345890\n'v'\n", "675 bytes of output were over the limit and are dropped\n")


def test_a_long_value_is_cut() -> None:
    shown = _Shown()
    shown.screen.result(ExecResult(outcome="ok", value="x" * 30_000))
    assert shown.texts[0].endswith("x [... 10,000 more characters]\n")


class _Reader:
    """Types the given cells; exceptions among them are raised."""

    def __init__(self, *cells: str | BaseException | type[BaseException]) -> None:
        self.cells = list(cells)
        self.names: list[frozenset[str]] = []

    def read(self, names: frozenset[str]) -> str:
        self.names.append(names)
        if not self.cells:
            raise EOFError
        cell = self.cells.pop(0)
        if isinstance(cell, str):
            return cell
        raise cell


def _conversation(session: FakeREPL, *cells: Any) -> tuple[bool, _Reader, tuple[str, str]]:
    shown, reader = _Shown(), _Reader(*cells)
    ok = Shell(session, shown.screen).converse(reader)
    return ok, reader, shown.texts


def test_a_conversation() -> None:
    ok, reader, (out, err) = _conversation(
        FakeREPL(), "needle = 42", KeyboardInterrupt, "  ", "needle", "1/0", "print('a', end='')"
    )
    assert ok
    assert out == "42\na\n"
    assert "ZeroDivisionError" in err
    assert "needle" in reader.names[-1]


def test_names_that_are_none_are_not_completed() -> None:
    class Odd(FakeREPL):
        def names(self) -> dict[str, str]:
            return dict.fromkeys(["good", "not a name", "\x1b[31m", "n" * 500, *(f"n{i}" for i in range(5_000))], "")

    _, reader, _ = _conversation(Odd(), "1")
    assert "good" in reader.names[-1]
    assert len(reader.names[-1]) <= 2_000
    assert all(name.isidentifier() and len(name) <= 100 for name in reader.names[-1])


def test_names_that_cannot_be_listed() -> None:
    class Odd(FakeREPL):
        def names(self) -> dict[str, str]:
            raise GuestCrashed("the guest \x1b[31mdied")

    ok, _, (out, err) = _conversation(Odd(), "41", "42")
    assert (ok, out) == (True, "41\n42\n")
    assert "the names could not be listed: the guest \\x1b[31mdied\n" in err


def test_the_end_of_the_session_is_the_end() -> None:
    class Over(FakeREPL):
        def exec(self, code: str, **_: Any) -> ExecResult:
            raise SessionClosed("session_seconds are over; open another")

    ok, _, (_, err) = _conversation(Over(), "1", "2")
    assert not ok
    assert err == "the session is over: session_seconds are over; open another\n"
    shown = _Shown()
    assert not Shell(Over(), shown.screen).run_all(["1", "2"])


class _Endless(FakeREPL):
    """Its cells end by `interrupt` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = threading.Event()
        self.interrupts = 0

    def exec(self, code: str, **_: Any) -> ExecResult:
        if code == "go on":
            return ExecResult(outcome="ok", value="'went on'")
        # Ctrl-C, as the terminal sends it: to the process, whose main thread gets the exception.
        os.kill(os.getpid(), signal.SIGINT)
        assert self.stopped.wait(60)
        return ExecResult(outcome="interrupted", state="restored")

    def interrupt(self) -> None:
        self.interrupts += 1
        self.stopped.set()


def test_ctrl_c_ends_the_cell_and_not_the_program() -> None:
    session = _Endless()
    ok, _, (out, err) = _conversation(session, "endless", "go on")
    assert (ok, session.interrupts) == (True, 1)
    assert out == "'went on'\n"
    assert err == "interrupted\nstate restored: the variables are as they were before this cell\n"


def test_ctrl_c_ends_piped_input() -> None:
    shown, session = _Shown(), _Endless()
    with pytest.raises(KeyboardInterrupt):
        Shell(session, shown.screen).run_all(["endless", "go on"])
    assert shown.texts[0] == ""


@pytest.fixture
def repl(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(cli, "open_repl", lambda name, *, limits, **_: FakeREPL(limits=limits))

    def run(text: str | bytes, *arguments: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(cli.app, ["repl", *map(str, arguments)], input=text)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return run


Repl = Callable[..., tuple[int, str, str]]


def test_the_status_is_that_of_the_last_piped_cell(repl: Repl) -> None:
    assert repl("x = 42\n\nx") == (0, "42\n", "")
    code, out, err = repl("1/0\n\n42")
    assert (code, out) == (0, "42\n")
    assert "ZeroDivisionError" in err
    assert repl("42\n\n1/0")[0] == 1
    assert repl("") == (0, "", "")


def test_files_are_the_context(repl: Repl, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("hay needle")
    assert repl("len(P), ctx.find('needle')", path) == (0, "(10, [(4, 10, 'needle')])\n", "")


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (("--backend", "nope"), "1", "unknown backend 'nope'"),
        (("--memory-mb", "1"), "1", "--memory-mb must be between"),
        (("/nowhere.txt",), "1", "No such file"),
        ((), b"\xff\xfe", "standard input is not UTF-8 text"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(repl: Repl, arguments: tuple[str, ...], text: str | bytes, words: str) -> None:
    code, out, err = repl(text, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("rlm-sandbox: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_backend_that_is_missing_here(repl: Repl, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise BackendUnavailable("jail", "no user namespaces", "ask your administrator")

    monkeypatch.setattr(cli, "open_repl", missing)
    assert repl("1") == (1, "", "rlm-sandbox: backend 'jail' is unavailable: no user namespaces; ask your administrator\n")


def test_the_prompt_is_loaded_when_it_is_needed() -> None:
    code = "import sys, rlm_sandbox.cli; sys.exit('prompt_toolkit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
