"""The plain child of ``RestrictedOptions(process="plain")`` with the policy out of the way: what the kernel and the host enforce.

The code here owns its interpreter: no policy is installed. What must hold are the grades that are declared ``HARD``: time, memory
and crash. What a plain child does not keep out (files, the network, the host's own signals where both have one user) is in
``docs/limitations/restricted.md`` and is not claimed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from rlm_sandbox import Grade, Limits, REPLProtocol, RestrictedOptions
from rlm_sandbox.bridge.framed import FramedSession
from rlm_sandbox.protocol import SupportsReadFile
from rlm_sandbox.registry import SessionConfig

from ..conftest import declared_by, open_variant, require_usable, variant_state

MEMORY_MB: Final = 64
#: What the interpreter itself has resident, and the host's patience.
INTERPRETER_MB: Final = 48
PATIENCE_SECONDS: Final = 30.0


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    require_usable("restricted", variant_state("restricted-plain"))


@pytest.fixture
def repl() -> Iterator[REPLProtocol]:
    from rlm_sandbox.backends.restricted.child import PlainGuest

    limits = Limits(time_seconds=1, memory_mb=MEMORY_MB, session_seconds=60)
    config = SessionConfig(limits=limits, recovery=False, options=RestrictedOptions(process="plain"))
    with FramedSession(lambda: PlainGuest(limits), config, declared_by("restricted-plain")) as session:
        yield session


def _pid(repl: REPLProtocol) -> int:
    return int(repl.exec("import os\nos.getpid()").value or 0)


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_it_declares_hard_for_what_it_enforces() -> None:
    declared = declared_by("restricted-plain")
    hard = (
        declared.time_seconds,
        declared.wall_seconds,
        declared.memory_mb,
        declared.crash,
        declared.interrupt,
        declared.output_bytes,
    )
    assert set(hard) == {Grade.HARD}
    assert {declared.network, declared.disk_mb, declared.processes} == {Grade.COOPERATIVE}
    assert "none against an adversary" in declared.isolation


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10 ** 9)",
        "x = []\nwhile True:\n    x.append(bytearray(1 << 20))",
        "import resource\nresource.setrlimit(resource.RLIMIT_DATA, (-1, -1))\nx = bytearray(10 ** 9)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(10 ** 9)",
        "import resource\nfor n in (resource.RLIMIT_AS, resource.RLIMIT_DATA):\n    resource.prlimit(0, n, (-1, -1))\nx = bytearray(10 ** 9)",
        "import os\nos.setuid(0)",
        "import ctypes\nlibc = ctypes.CDLL(None)\nx = libc.malloc(10 ** 9)\nlibc.memset(x, 1, 10 ** 9) if x else 1 / 0",
        "import mmap\nx = [mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANON) for _ in range(1_000)]\n[m.write(b'x' * (1 << 20)) for m in x]",
    ],
)  # fmt: skip
def test_memory_is_bounded_by_the_kernel(repl: REPLProtocol, code: str) -> None:
    pid = _pid(repl)
    result = repl.exec(code)
    assert result.outcome in ("error", "limit", "crashed")
    if result.state == "kept":
        assert _status(pid, "VmHWM") / 1024 < MEMORY_MB + INTERPRETER_MB
    assert repl.exec("1 + 1").value == "2"


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True:\n    pass",
        "1.5 in range(10 ** 13)",
        "import re\nre.match('(a|aa)+$', 'a' * 60 + 'c')",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import time\nwhile True:\n    try:\n        time.sleep(1_000)\n    except BaseException:\n        pass",
        "import os\nos.setsid() if os.getpgid(0) != os.getpid() else None\nwhile True:\n    pass",
    ],
)  # fmt: skip
def test_time_ends_from_outside(repl: REPLProtocol, code: str) -> None:
    pid = _pid(repl)
    started = time.monotonic()
    result = repl.exec(code)
    assert time.monotonic() - started < PATIENCE_SECONDS
    assert result.outcome == "limit"
    assert result.limit is not None
    assert (result.limit.kind, result.limit.source) == ("time_seconds", "host")
    if result.state == "lost":
        assert not _exists(pid)
    assert repl.exec("1 + 1").value == "2"


@pytest.mark.parametrize(
    "code",
    [
        "import ctypes\nctypes.string_at(0)",
        "import os\nos._exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os\nos.closerange(3, 64)",
        "import os, socket\nfor n in range(3, 64):\n    try:\n        os.write(n, b'R' * 100)\n    except OSError:\n        pass",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
        "import os, signal\nos.abort()",
        "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self):\n        return repr([self])\nrepr(A())",
    ],
)  # fmt: skip
def test_a_death_costs_the_host_nothing(repl: REPLProtocol, code: str) -> None:
    pid = _pid(repl)
    result = repl.exec(code)
    assert result.outcome in ("crashed", "violation", "limit", "error")
    if result.outcome in ("crashed", "violation"):
        assert result.state == "lost"
        assert not _exists(pid)
    assert repl.exec("1 + 1").value == "2"


def test_it_starts_no_process_and_fills_no_disk(repl: REPLProtocol, tmp_path: Path) -> None:
    """Not claimed as HARD (POSIX does not promise the first), but set."""
    assert repl.exec("import os\nos.fork()").error is not None
    tmp_path.chmod(0o777)
    target = tmp_path / "file"
    assert repl.exec(f"open({str(target)!r}, 'w').write('x' * 100_000)").outcome == "error"
    assert not target.exists() or target.stat().st_size == 0
    assert (repl.exec("import resource\nresource.getrlimit(resource.RLIMIT_CPU)").value or "").startswith("(65,")


def test_a_root_host_gives_its_rights_away(repl: REPLProtocol) -> None:
    pid = _pid(repl)
    if os.geteuid() == 0:
        assert _status(pid, "Uid") != 0
        assert (
            repl.exec(f"import os, signal\nos.kill({os.getpid()}, 0)").error == "PermissionError: [Errno 1] Operation not permitted"
        )
    assert _status(pid, "NoNewPrivs") == 1


def test_it_brings_no_file_of_the_hosts_out() -> None:
    with open_variant("restricted-plain", accept=Grade.COOPERATIVE, trusted=True) as session:
        assert not isinstance(session, SupportsReadFile)
        assert not declared_by("restricted-plain").files


def test_its_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlm_sandbox.backends.restricted.child import PlainGuest

    monkeypatch.setenv("RLM_CANARY", "canary-51")
    limits = Limits()
    config = SessionConfig(limits=limits, recovery=False)
    with FramedSession(lambda: PlainGuest(limits), config, declared_by("restricted-plain")) as session:
        pid = _pid(session)
        assert session.exec("dict(os.environ)").value == "{}"
        assert b"canary-51" not in Path(f"/proc/{pid}/environ").read_bytes()
        # Its three streams, data and leash, and what a worker makes for itself.
        assert len(list(Path(f"/proc/{pid}/fd").iterdir())) <= 8, "a descriptor of the host's was passed on"


_HOST: Final = """
import os, signal, sys, threading, time
from rlm_sandbox import Grade, Limits, RestrictedOptions, open_repl
repl = open_repl("restricted", limits=Limits(time_seconds=600, session_seconds=None), accept=Grade.COOPERATIVE, trusted=True,
                 options=RestrictedOptions(process="plain"))
started = threading.Event()
repl.bind("begun", started.set)
print(repl._inner._guest._process.pid, flush=True)
code = sys.argv[1]
if code:
    threading.Thread(target=repl.exec, args=(code,), daemon=True).start()
    started.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_outlives_the_thread_that_opened_it() -> None:
    opened: list[REPLProtocol] = []
    thread = threading.Thread(
        target=lambda: opened.append(open_variant("restricted-plain", accept=Grade.COOPERATIVE, trusted=True))
    )
    thread.start()
    thread.join()
    with opened[0] as repl:
        assert repl.exec("1 + 1").value == "2"


@pytest.mark.parametrize(
    "code", ["", "begun()\nwhile True:\n    pass", "import time\nbegun()\ntime.sleep(500)"], ids=["idle", "busy", "asleep"]
)
def test_it_ends_with_its_host(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_HOST), code], capture_output=True, text=True, timeout=60, check=False
    )
    pid = int(done.stdout)
    _wait_until(lambda: not _exists(pid))


def _exists(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.05)
