"""The supervisor that a zygote forks ahead: one at most, nobody's until it is somebody's, and not missed when it dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlm_sandbox import Limits, REPLProtocol, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from ..escape.outside import wait_until
from ..spares import is_spare

SMALL = Limits(memory_mb=128)


@pytest.fixture
def session() -> Iterator[REPLProtocol]:
    """One that keeps its zygote alive."""
    require_usable("jail", load_backend("jail").probe())
    with open_repl("jail", limits=SMALL) as repl:
        yield repl


def supervisor_of(repl: REPLProtocol) -> psutil.Process:
    found = psutil.Process(repl._guest._worker_pid).parent()  # type: ignore[attr-defined]
    assert found is not None
    return found


def zygote_of(repl: REPLProtocol) -> psutil.Process:
    found = supervisor_of(repl).parent()
    assert found is not None
    return found


def spares_of(zygote: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in zygote.children():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and is_spare(process):
                found.append(process)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            pass
    return found


def waiting(zygote: psutil.Process) -> psutil.Process:
    wait_until(lambda: len(spares_of(zygote)) == 1, "no spare waits", 10)
    return spares_of(zygote)[0]


def test_a_spare_becomes_the_next_session_and_another_one_waits(session: REPLProtocol) -> None:
    spare = waiting(zygote_of(session))
    with open_repl("jail", limits=SMALL) as repl:
        assert supervisor_of(repl).pid == spare.pid
        assert repl.exec("1 + 1").value == "2"
        assert waiting(zygote_of(session)).pid != spare.pid


def test_a_spare_that_was_killed_is_not_missed(session: REPLProtocol) -> None:
    zygote = zygote_of(session)
    for _ in range(3):
        spare = waiting(zygote)
        spare.kill()
        wait_until(lambda spare=spare: not spare.is_running(), "the spare lives", 10)  # type: ignore[misc]
        with open_repl("jail", limits=SMALL) as repl:
            assert repl.exec("1 + 1").value == "2"
    assert session.exec("2 + 2").ok


def test_many_openings_at_once_leave_one_spare(session: REPLProtocol) -> None:
    zygote = zygote_of(session)
    others = [open_repl("jail", limits=SMALL) for _ in range(8)]
    waiting(zygote)
    for repl in others:
        assert repl.exec("1").ok
        repl.close()
    assert len(spares_of(zygote)) == 1


def test_a_spare_has_left_what_it_must_not_share(session: REPLProtocol) -> None:
    """As the kernel sees it: namespaces and a user of its own, the zygote's control socket closed, nothing of a session held."""
    zygote = zygote_of(session)
    spare = waiting(zygote)

    def namespace(pid: int, kind: str) -> str:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())

    wait_until(lambda: namespace(spare.pid, "net") != namespace(zygote.pid, "net"), "it stays where the zygote is", 10)
    for kind in ("user", "mnt", "ipc", "uts", "net", "pid"):
        assert namespace(spare.pid, kind) not in (namespace(zygote.pid, kind), namespace(supervisor_of(session).pid, kind)), kind
    if os.geteuid() == 0:
        assert spare.uids().real not in (0, zygote.uids().real, supervisor_of(session).uids().real)

    def sockets(pid: int) -> set[str]:
        return {link for fd in Path(f"/proc/{pid}/fd").iterdir() if (link := str(fd.readlink())).startswith("socket:")}

    if os.geteuid() == 0:  # the table of a process that is not dumpable is root's
        assert len(sockets(spare.pid)) == 1
        assert not sockets(spare.pid) & (sockets(zygote.pid) | sockets(supervisor_of(session).pid))
