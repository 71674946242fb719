"""`rlm-sandbox repl` as a process, on a real backend: through pipes, and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlm_sandbox import available

from ..conftest import require_usable

REPL = [sys.executable, "-m", "rlm_sandbox", "repl"]
#: Makes standard input the controlling terminal, so that Ctrl-C is a signal.
_ON_A_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture(autouse=True)
def _jail() -> None:
    require_usable("jail", available()["jail"])


def _piped(text: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([*REPL, *arguments], input=text, capture_output=True, text=True, timeout=60)
    assert "rlm_sandbox/" not in done.stderr, "a traceback of the host"
    return done.returncode, done.stdout, done.stderr


def test_piped_cells(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("hay needle hay")
    code, out, err = _piped(
        "n = len(P)\n\ndef twice(x):\n\n    return 2 * x\n\ntwice(n)\n\nprint('\\x1b[31mred')\n\nwhile True: pass\n\nctx.find('needle')",
        "--time-seconds", "0.3", "--backend", "jail", str(path),
    )  # fmt: skip
    assert (code, out) == (0, "28\n\\x1b[31mred\n[(4, 10, 'needle')]\n")
    assert "limit hit: time_seconds of 0.3" in err
    assert "state kept" in err


def test_a_killed_cell_is_said_in_words() -> None:
    code, out, err = _piped("x = 42\n\nx = 0\nsum(range(10 ** 13))\n\nx", "--time-seconds", "0.3")
    assert (code, out) == (0, "42\n")
    assert "limit hit: time_seconds" in err
    assert "state restored: the variables are as they were before this cell\n" in err


def test_the_last_cell_fails() -> None:
    assert _piped("import os\n\nos._exit(3)")[0] == 1


class _Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "LANG": "C.UTF-8",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_A_TERMINAL, *REPL, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, words: str, seconds: float = 20.0) -> None:
        """Read until ``words`` came, and forget what came until then."""
        until = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < until, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                raw = os.read(self.master, 65_536).decode("utf-8", "replace")
                self.seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw)
        self.seen = self.seen.partition(words)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[_Terminal]:
    opened = _Terminal(tmp_path, "--time-seconds", "30")
    yield opened
    opened.close()


def test_on_a_terminal(terminal: _Terminal, tmp_path: Path) -> None:
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for(">>>")
    terminal.type("needle = 40 + 2\r")
    terminal.wait_for(">>>")
    terminal.wait_for(">>>")
    terminal.type("print('started', flush=True)\x1b\r")
    terminal.wait_for("\nstarted")
    terminal.wait_for(">>>")
    terminal.type("print('now', flush=True); import time; time.sleep(25)\r")
    terminal.wait_for("\nnow")
    started = time.monotonic()
    terminal.type("\x03")
    terminal.wait_for("interrupted")
    terminal.wait_for("state kept")
    assert time.monotonic() - started < 20
    terminal.wait_for(">>>")
    terminal.type("needl\t + 1\r")
    terminal.wait_for("\n43")
    terminal.wait_for(">>>")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    history = tmp_path / ".local" / "state" / "rlm-sandbox" / "repl_history"
    assert "needle = 40 + 2" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
