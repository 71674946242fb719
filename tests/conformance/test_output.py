"""Semantic 2 of the design: output is kept on error, bounded while it is produced, and survives a kill."""

from __future__ import annotations

import re
import threading

import pytest

from rlm_sandbox import Feature, Limits, OutputChunk, REPLProtocol

from ..conftest import OpenSession
from .support import PATIENCE_SECONDS, enforces, error_type, needs, ok, run


def test_print_is_captured(repl: REPLProtocol) -> None:
    result = ok(repl.exec("print('one')\nprint('two', 3, sep='-', end='!')"))
    assert result.stdout == "one\ntwo-3!"
    assert result.stderr == ""
    assert result.dropped_bytes == 0


def test_output_is_kept_on_error(repl: REPLProtocol) -> None:
    result = repl.exec("print('before')\n1 / 0")
    assert error_type(result) == "ZeroDivisionError"
    assert result.stdout == "before\n"


def test_output_belongs_to_its_own_cell(repl: REPLProtocol) -> None:
    ok(repl.exec("print('first')"))
    assert ok(repl.exec("x = 1")).stdout == ""
    assert ok(repl.exec("print('third')")).stdout == "third\n"


@needs(Feature.IMPORTS)
def test_stderr_is_captured_apart(repl: REPLProtocol) -> None:
    result = ok(repl.exec("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.stdout.write('more')"))
    assert result.stdout == "out\nmore"
    assert result.stderr == "err\n"


def test_stdout_is_raw_text(repl: REPLProtocol) -> None:
    text = "\x1b[31mred\x1b[0m \x00 \x07 a\rb \u202e \U0001f600 ünïcode"
    assert ok(repl.exec(f"print({text!r}, end='')")).stdout == text


def test_a_lone_surrogate_in_output_never_raises_in_the_host(repl: REPLProtocol) -> None:
    result = repl.exec("print('a\\ud800b')")
    assert result.outcome in ("ok", "error")
    assert run(repl, "x = 1", "x") == 1


@needs(Feature.RAW_DESCRIPTORS)
def test_writes_to_the_descriptors_are_captured(repl: REPLProtocol) -> None:
    result = ok(repl.exec("import os\nwritten = os.write(1, b'raw\\n') + os.write(2, b'raw err\\n')"))
    assert (result.stdout, result.stderr) == ("raw\n", "raw err\n")


@needs(Feature.RAW_DESCRIPTORS)
def test_bytes_that_are_not_text_arrive_as_text(repl: REPLProtocol) -> None:
    result = ok(repl.exec("import os\nwritten = os.write(1, b'a\\xff\\xfeb')"))
    assert result.stdout.startswith("a")
    assert result.stdout.endswith("b")


@needs(Feature.CPYTHON)
def test_redirect_stdout_works_in_the_guest(repl: REPLProtocol) -> None:
    code = "import contextlib, io\nbuffer = io.StringIO()\nwith contextlib.redirect_stdout(buffer):\n    print('inside')\nr = buffer.getvalue()"
    result = ok(repl.exec(code))
    assert result.stdout == ""
    assert repl.get("r") == "inside\n"


@pytest.mark.parametrize("code", ["import sys\nsys.stdout.close()", "import sys\nsys.stdout = None", "import sys\ndel sys.stdout"])
def test_a_broken_stdout_breaks_nothing_else(repl: REPLProtocol, code: str) -> None:
    ok(repl.exec("kept = 1"))
    repl.exec(code)
    # As in any REPL, print may fail from here on; the session may not.
    assert repl.exec("print('again')").outcome in ("ok", "error")
    assert run(repl, "x = kept + 1", "x") == 2


# ---- bounded while it is produced

_LINE = re.compile(r"line \d{6}")


@enforces("output_bytes")
def test_long_output_is_head_and_tail_and_a_count(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(output_bytes=2_000))
    result = ok(repl.exec("for i in range(20_000):\n    print(f'line {i:06d}')\ndone = 1"))
    total = 20_000 * len("line 000000\n")
    assert result.stdout.startswith("line 000000\nline 000001\n")
    assert result.stdout.endswith("line 019998\nline 019999\n")
    assert total - 2_000 <= result.dropped_bytes < total
    # What is kept stays within the limit, give or take a mark where the gap is.
    assert len(_LINE.findall(result.stdout)) * len("line 000000\n") <= 2_000
    assert len(result.stdout) <= 2_000 + 200
    assert repl.get("done") == 1


@enforces("output_bytes")
def test_one_huge_write_is_bounded(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(output_bytes=10_000))
    result = ok(repl.exec("print('<' + 'x' * 8_000_000 + '>')\ndone = 1"))
    assert result.stdout.startswith("<x")
    assert result.stdout.endswith("x>\n")
    assert len(result.stdout) <= 10_000 + 200
    assert result.dropped_bytes >= 8_000_000 - 10_000
    assert repl.get("done") == 1


@enforces("output_bytes")
def test_both_streams_share_the_bound(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(output_bytes=2_000))
    result = ok(repl.exec("import sys\nfor i in range(1000):\n    print('o' * 9)\n    print('e' * 9, file=sys.stderr)"))
    assert len(result.stdout) + len(result.stderr) <= 2_000 + 400
    assert result.dropped_bytes >= 20_000 - 2_000
    assert result.stdout.startswith("ooo")


@enforces("output_bytes")
def test_the_bound_counts_bytes_and_cuts_no_character(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(output_bytes=1_001))
    result = ok(repl.exec("print('é' * 5_000, end='')"))
    kept = result.stdout.count("é") * 2
    assert kept <= 1_001
    assert "\ufffd" not in result.stdout
    assert 10_000 - 1_001 <= result.dropped_bytes <= 10_000


@enforces("output_bytes")
def test_no_output_at_all(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(output_bytes=0))
    result = ok(repl.exec("print('12345')"))
    assert "12345" not in result.stdout
    assert result.dropped_bytes == 6


@enforces("output_bytes")
def test_a_cell_may_ask_for_less_output(repl: REPLProtocol) -> None:
    result = ok(repl.exec("print('x' * 5_000)", limits=Limits(output_bytes=100)))
    assert result.stdout.count("x") <= 100
    assert ok(repl.exec("print('x' * 5_000)")).stdout.count("x") == 5_000


# ---- survives a kill


@enforces("time_seconds")
def test_output_survives_a_kill(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0))
    result = repl.exec("print('written before the loop')\nwhile True:\n    pass")
    assert result.outcome == "limit"
    assert "written before the loop" in result.stdout


@enforces("time_seconds", "output_bytes")
def test_a_flood_is_bounded_and_killed(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(time_seconds=1.0, output_bytes=4_096))
    result = repl.exec("print('head')\nwhile True:\n    print('y' * 1000)")
    assert result.outcome == "limit"
    assert result.stdout.startswith("head\n")
    assert len(result.stdout) <= 4_096 + 200
    assert result.dropped_bytes > 0
    assert run(repl, "x = 1", "x") == 1


@needs(Feature.CPYTHON)
def test_output_survives_a_crash(repl: REPLProtocol) -> None:
    result = repl.exec("print('last words')\nimport os\nos._exit(7)")
    assert result.outcome == "crashed"
    assert "last words" in result.stdout


# ---- on_output


def test_on_output_gets_the_same_text(repl: REPLProtocol) -> None:
    chunks: list[OutputChunk] = []
    threads: set[int] = set()

    def listen(chunk: OutputChunk) -> None:
        chunks.append(chunk)
        threads.add(threading.get_ident())

    result = ok(repl.exec("for i in range(100):\n    print(i)", on_output=listen))
    assert "".join(chunk.text for chunk in chunks if chunk.stream == "stdout") == result.stdout
    assert result.stdout.split() == [str(i) for i in range(100)]
    assert threads == {threading.get_ident()}, "on_output runs on the thread that called exec"


def test_on_output_comes_while_the_cell_runs(repl: REPLProtocol) -> None:
    seen = threading.Event()

    def wait() -> bool:
        return seen.wait(PATIENCE_SECONDS)

    repl.bind("wait", wait)
    ok(repl.exec("print('now')\nr = wait()", on_output=lambda chunk: seen.set()))
    assert repl.get("r") is True


@enforces("output_bytes")
def test_on_output_is_bounded_too(open_session: OpenSession) -> None:
    repl = open_session(limits=Limits(output_bytes=1_000))
    chunks: list[OutputChunk] = []
    ok(repl.exec("for i in range(5_000):\n    print('z' * 99)", on_output=chunks.append))
    # The live view need not show the tail, but a flood must not reach the listener.
    assert sum(len(chunk.text) for chunk in chunks) <= 100_000
