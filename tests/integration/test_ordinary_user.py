"""The jail of a user without privileges. Run as root, these tests become one; run as anybody else, the whole suite is that."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlm_sandbox

NOBODY = 65534
_SCRIPT = """
import json, os
from rlm_sandbox import Limits, Context, open_repl
with open_repl("jail", limits=Limits(time_seconds=2, memory_mb=128)) as repl:
    repl.bind("ctx", Context.from_text("hay needle " * 1000))
    repl.bind("ask", lambda text: text.upper())
    first = repl.exec("hits = ctx.find('needle')\\nask(hits[0][2]), len(ctx)")
    killed = repl.exec("import os\\nhits = None\\nos._exit(1)")
    after = repl.exec("hits[0][2]")
    inside = repl.exec("import os\\n(os.getuid(), os.listdir('/tmp'), os.path.exists('/etc'), os.path.exists('/proc'))")
    forked = repl.exec("import os\\nos.fork()")
    point = repl.checkpoint()
    with repl.fork() as copy:
        changed = copy.exec("hits = None\\nhits")
    repl.exec("hits = 5")
    repl.restore(point)
    back = repl.exec("hits[0][2]")
print(json.dumps([os.getuid(), first.value, killed.state, after.value, inside.value, forked.error, changed.outcome, back.value]))
"""


def _readable_by_all(path: Path) -> bool:
    """Whether any user can reach and execute it: every directory on the way lets others through."""
    resolved = path.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (resolved, *resolved.parents))


def _interpreter() -> str:
    """An interpreter from 3.11 on that a user without privileges may run."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        path = Path(candidate)
        if path.exists() and _readable_by_all(path):
            found = subprocess.run(
                [candidate, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True
            )
            if found.stdout.strip() == "True":
                return candidate
    pytest.skip("there is no interpreter from 3.11 on that an ordinary user can execute (home directories are closed)")


@pytest.fixture
def package() -> Iterator[str]:
    """A copy of the package that everybody can read."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    shutil.copytree(Path(rlm_sandbox.__file__).parent, directory / "rlm_sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield str(directory)
    shutil.rmtree(directory)


@pytest.mark.skipif(os.getuid() != 0, reason="the suite runs as an ordinary user anyway")
def test_the_jail_works_for_a_user_without_privileges(package: str) -> None:
    done = subprocess.run(
        [_interpreter(), "-c", _SCRIPT],
        env={"PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    uid, first, state, after, inside, forked, changed, back = json.loads(done.stdout)
    assert uid == NOBODY
    assert first == "('NEEDLE', 11000)"
    assert (state, after) == ("restored", "'needle'")
    assert inside == "(1000, [], False, False)"
    assert forked == "PermissionError: [Errno 1] Operation not permitted"
    assert (changed, back) == ("ok", "'needle'")
