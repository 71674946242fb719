"""A host that is short of file descriptors, at every point of what a session does: a typed error, and nothing leaks.

In processes of its own: a limit on descriptors is the whole process's.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Final

import pytest

from rlm_sandbox.registry import load_backend

from ..conftest import require_usable

#: More than anything below needs at once.
ENOUGH: Final = 40

_HOST: Final = textwrap.dedent("""
    import contextlib, gc, os, resource, sys
    import psutil
    from rlm_sandbox.backends.jail import launch
    from rlm_sandbox.registry import load_backend
    from rlm_sandbox import BackendUnavailable, GuestCrashed, Limits, SandboxError, SessionPool, open_repl
    what, enough = sys.argv[1], int(sys.argv[2])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    limits = Limits(memory_mb=64, disk_mb=4)

    @contextlib.contextmanager
    def only(free):
        taken = []
        try:
            while True: taken.append(os.dup(0))
        except OSError: pass
        for _ in range(free): os.close(taken.pop())
        try: yield
        finally:
            for fd in taken: os.close(fd)

    def lives(process):
        with contextlib.suppress(psutil.NoSuchProcess): return process.status() != psutil.STATUS_ZOMBIE

    def held():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), sum(map(bool, map(lives, psutil.Process().children(recursive=True))))

    def settled(before):
        for _ in range(500):
            now = held()
            if now[0] <= before[0] and now[1] <= before[1]: return
            import time; time.sleep(0.02)
        raise SystemExit(f"leaked: {before} {now}")

    def unavailable(exc):
        assert isinstance(exc, BackendUnavailable) and "ulimit -n" in exc.remedy, repr(exc)

    done = 0
    load_backend("jail").probe()  # an import that cannot open its file is Python's own error
    if what == "cold":
        launch._close_all()
    if what != "cold":
        warm = open_repl("jail", limits=limits)
        warm.exec("x = [1]")
    # The warm session's standby and the zygote's spare come when they come: two processes more than at the start, ever, are no leak.
    most = held()[1] + 2
    for free in range(0, enough, 1 if what == "open" else 4):
        before = held()[0], most
        if what in ("open", "cold", "pool"):
            made = None
            with only(free):
                try:
                    made = SessionPool("jail", 1, limits, ready=0) if what == "pool" else open_repl("jail", limits=limits)
                except SandboxError as exc: unavailable(exc)
            if made:
                done += 1
                if what != "pool": assert made.exec("1 + 1").value == "2"
                made.close()
            if what == "cold":
                launch._close_all()
            settled(before)
        elif what == "kill":
            with only(free): result = warm.exec("x = None; import os; os._exit(1)")
            assert (result.outcome, result.state) == ("crashed", "restored"), (free, result)
            assert warm.exec("x").value == "[1]"
            done += 1
            settled(before)
        else:
            made = None
            point = warm.checkpoint() if what == "restore" else ""
            before = held()[0], most
            with only(free):
                try:
                    made = warm.fork() if what == "fork" else warm.checkpoint() if what == "checkpoint" else warm.restore(point)
                    done += 1
                except GuestCrashed as exc: assert exc.state == "kept" and "ulimit -n" in str(exc), (free, exc)
            if what == "fork" and made:
                assert made.exec("x").value == "[1]"
                made.close()
            assert warm.exec("x").value == "[1]", free
            if what == "fork": settled(before)
    assert 0 < done, done
    assert done < enough or what == "kill", "nothing was ever refused"
    print("fine")
""")


@pytest.mark.parametrize("what", ["open", "cold", "pool", "kill", "fork", "checkpoint", "restore"])
def test_a_host_short_of_descriptors_is_told_so_and_loses_none(what: str) -> None:
    require_usable("jail", load_backend("jail").probe())
    ended = subprocess.run(
        [sys.executable, "-c", _HOST, what, str(ENOUGH)], capture_output=True, text=True, timeout=110, check=False
    )
    assert ended.stdout == "fine\n", ended.stderr[-3000:]
