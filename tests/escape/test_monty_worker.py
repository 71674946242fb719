"""Monty's worker in the hands of its guest: whoever owns the interpreter owns a process behind these walls.

The attack runs where the interpreter would: in a process that has gone through the same confinement, with a Python in place
of Monty, so that it can say any system call. What it says of itself is no evidence: a victim process, a file, a server and the
list of processes are looked at from outside. The same attack without the walls must hurt all of them.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import rlm_sandbox
from rlm_sandbox import Limits, open_repl

from ..conftest import require_usable, variant_state
from .outside import Listener

_ATTACK = """
import ctypes, os, resource, signal, socket, sys, types
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
canary, port, victim, marker, confined, package, binary, libraries = {canary!r}, {port}, {victim}, {marker!r}, {confined}, {package!r}, {binary!r}, {libraries!r}
report = []
if confined:
    guest = types.ModuleType("rlm_guest")
    guest.__path__ = [package]
    sys.modules["rlm_guest"] = guest
    from rlm_guest.confine.engine import confine_engine
    confine_engine(binary, libraries, os.getppid())

def attempt(name, act):
    try:
        found = act()
    except OSError as exc:
        report.append(name + "=refused")
    except BaseException as exc:
        report.append(name + "=" + type(exc).__name__)
    else:
        report.append(name + "=DONE")

def call(number, *args):
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def overwrite(path):
    with open(path, "w") as file:
        file.write("owned")

def connect():
    with socket.create_connection(("127.0.0.1", port), timeout=2) as there:
        there.sendall(b"owned")

def child():
    pid = os.fork()
    if pid == 0:
        os.execve("/bin/sh", ["sh", "-c", ": > " + marker], {{}})
    os.waitpid(pid, 0)

attempt("read", lambda: open("/etc/passwd").read())
attempt("list", lambda: os.listdir("/proc"))
attempt("write", lambda: overwrite(canary))
attempt("write the root", lambda: overwrite("/owned"))
attempt("write the program", lambda: overwrite("/bin/engine"))
attempt("connect", connect)
attempt("fork and execute", child)
attempt("slow the victim", lambda: resource.prlimit(victim, resource.RLIMIT_NOFILE, (3, 3)))
attempt("trace the victim", lambda: call(101, 16, victim, 0, 0))
attempt("open the victim", lambda: call(434, victim, 0))
attempt("read the victim", lambda: call(310, victim, 0, 0, 0, 0, 0))
attempt("raise a limit", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000)))
attempt("namespace", lambda: call(272, 0x10000000))
attempt("mount", lambda: call(165, b"none", b"/", b"tmpfs", 0, 0))
attempt("memory file", lambda: call(319, b"x", 0))
attempt("rings", lambda: call(425, 8, 0))
attempt("bpf", lambda: call(321, 0, 0, 0))
attempt("events", lambda: call(298, 0, 0, 0, 0, 0))
attempt("keys", lambda: call(250, 0, -3, 1, 0, 0))
attempt("handles", lambda: call(304, 0, 0, 0))
attempt("modules", lambda: call(313, 0, 0, 0))
attempt("faults", lambda: call(323, 0))
attempt("kill everybody", lambda: os.kill(-1, 0))
attempt("kill the host", lambda: os.kill(os.getppid(), 0))
attempt("kill the victim", lambda: os.kill(victim, signal.SIGKILL))
attempt("kill by thread", lambda: call(234, victim, victim, 9))
os.write(1, ("|".join(report) + "|end").encode())
"""


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    require_usable("monty", variant_state("monty"))


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def attack(tmp_path: Path, port: int, victim: int, *, confined: bool) -> dict[str, str]:
    """Run the attack; returns what it says of itself."""
    from pydantic_monty._binary import find_monty_binary

    from rlm_sandbox.backends.monty.launch import _libraries

    binary = os.path.realpath(find_monty_binary())
    (tmp_path / "canary").write_text("untouched")
    program = _ATTACK.format(
        canary=str(tmp_path / "canary"), port=port, victim=victim, marker=str(tmp_path / "marker"), confined=confined,
        package=str(Path(rlm_sandbox.__file__).parent), binary=binary, libraries=_libraries(binary),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], stdin=subprocess.DEVNULL, capture_output=True, timeout=30, env={}, check=False
    )
    said, end = done.stdout.decode().split("|")[:-1], done.stdout.decode().rpartition("|")[2]
    assert end == "end", (done.returncode, done.stdout, done.stderr)
    return dict(part.split("=") for part in said)


def test_a_worker_that_is_owned_reaches_nothing(tmp_path: Path, victim: subprocess.Popen[bytes]) -> None:
    before = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
    server = Listener()
    try:
        said = attack(tmp_path, server.port, victim.pid, confined=True)
        server.assert_unreached()
    finally:
        server.close()
    assert (tmp_path / "canary").read_text() == "untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary"]
    assert victim.poll() is None
    assert resource.prlimit(victim.pid, resource.RLIMIT_NOFILE) == before
    assert {child.pid for child in psutil.Process().children(recursive=True)} & {victim.pid}
    assert len(said) > 20, "the attack ran to its end"
    assert [name for name, answer in said.items() if answer == "DONE"] == []


def test_the_same_attack_without_the_walls_hurts(tmp_path: Path, victim: subprocess.Popen[bytes]) -> None:
    server = Listener()
    try:
        said = attack(tmp_path, server.port, victim.pid, confined=False)
        with server.tcp.accept()[0] as reached:
            assert reached.recv(5) == b"owned"
    finally:
        server.close()
    assert (tmp_path / "canary").read_text() == "owned"
    assert (tmp_path / "marker").exists()
    assert victim.wait(10) == -9
    assert said["connect"] == "DONE"


def test_cells_reach_no_file_process_or_network_of_the_host(tmp_path: Path) -> None:
    """The language itself: whatever names a model tries, nothing answers with the host's state."""
    (tmp_path / "canary").write_text("untouched")
    path = str(tmp_path / "canary")
    with open_repl("monty", limits=Limits(time_seconds=2)) as repl:
        for code in (
            f"open({path!r}).read()",
            f"open({path!r}, 'w').write('owned')",
            f"import pathlib\npathlib.Path({path!r}).read_text()",
            f"import pathlib\npathlib.Path({path!r}).unlink()",
            "import os\nos.listdir('/')",
            f"import os\nos.remove({path!r})",
            "import os\nos.environ['PATH']",
            "import os\nos.getenv('PATH') or 1 / 0",
            "import os\nos.system('true')",
            "import subprocess",
            "import socket",
            "().__class__.__bases__[0].__subclasses__()",
            "(lambda: 0).__globals__",
            "eval.__self__",
            "__import__('os').system('true')",
            "exec('import socket')",
            "import sys\nsys.modules['os']",
            "import asyncio\nawait asyncio.create_subprocess_shell('true')",
            "import asyncio\nawait asyncio.open_connection('127.0.0.1', 80)",
        ):
            result = repl.exec(code)
            assert result.outcome == "error", (code, result.value)
            assert os.fspath(tmp_path) not in (result.error or "").replace(path, "")
    assert (tmp_path / "canary").read_text() == "untouched"


def test_a_dump_that_is_forged_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that this process did not seal never reaches the engine, which would trust its bytes."""
    import dataclasses

    from rlm_sandbox.backends.monty.worker import Worker

    loaded: list[bytes] = []
    real = Worker.load

    def load(worker: Worker, state: bytes) -> None:
        loaded.append(state)
        real(worker, state)

    monkeypatch.setattr(Worker, "load", load)
    with open_repl("monty", limits=Limits(time_seconds=0.3)) as repl:
        repl.exec("x = 1")
        repl.get("x")
        repl.exec("y = 2")
        repl.names()
        interpreter = repl._interpreter  # type: ignore[attr-defined]
        interpreter.settle()
        point = interpreter._point
        forged = bytearray(point.state.state)
        forged[len(forged) // 2] ^= 1
        interpreter._point = dataclasses.replace(point, state=dataclasses.replace(point.state, state=bytes(forged)))
        result = repl.exec("while True: pass")
        assert (result.outcome, result.state) == ("limit", "lost")
        assert set(result.lost_names) == {"x", "y"}
        assert repl.exec("1 + 1").value == "2"
    assert bytes(forged) not in loaded
