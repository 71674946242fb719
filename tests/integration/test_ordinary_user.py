"""The jail of a user without privileges. Run as root, these tests become one; run as anybody else, the whole suite is that."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from ..ordinary_user import copied, interpreter

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


@pytest.fixture
def package() -> Iterator[str]:
    """A copy of the package that everybody can read."""
    with copied("rlm_sandbox") as directory:
        yield directory


@pytest.mark.skipif(os.getuid() != 0, reason="the suite runs as an ordinary user anyway")
def test_the_jail_works_for_a_user_without_privileges(package: str) -> None:
    done = subprocess.run(
        [interpreter(), "-c", _SCRIPT],
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
