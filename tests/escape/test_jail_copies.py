"""Attacks on copies of a session and on the states it goes back to, prepared by a cell before they are made."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Final

import psutil
import pytest

from rlm_sandbox import ExecResult, GuestCrashed, Limits, REPLProtocol
from rlm_sandbox.bridge.copying import MAX_CHECKPOINTS, CopyingSession
from rlm_sandbox.runners.branches import MAX_BRANCHES

from .conftest import SMALL, OpenJail
from .outside import TOOLS, SessionProcesses, wait_until, within

#: Keep every channel there is under other numbers, so that a copy still has them.
_HOARD: Final = TOOLS + "hoard = [os.dup(fd) for fd in (1, 2, data, birth)]\nout2, err2, data2, birth2 = hoard\n"


@pytest.fixture
def hoarder(open_jail: OpenJail) -> CopyingSession:
    repl = open_jail(None)
    assert isinstance(repl, CopyingSession)
    assert repl.exec(_HOARD + "x = {'kept': [41]}").ok
    return repl


@pytest.fixture
def copies(hoarder: CopyingSession) -> Iterator[list[CopyingSession]]:
    opened: list[CopyingSession] = []
    yield opened
    for repl in opened:
        repl.close()


def usable(repl: REPLProtocol) -> None:
    with within(4):
        result = repl.exec("print('mine')\nx['kept'][0] + 1")
    assert (result.outcome, result.value, result.stdout, result.stderr) == ("ok", "42", "mine\n", "")


ATTACKS: Final = {
    "COPY-001 write ends of turns and noise to the channels of the other": "for fd in range(3, 256):\n"
    "    if fd != data:\n        try: os.write(fd, DONE * 3)\n        except OSError: pass",
    "COPY-002 print as the other": "os.write(out2, b'forged')\nos.write(err2, b'forged')",
    "COPY-003 a forged greeting of a standby": "for word in (b'H', b'F', b'L'):\n"
    "    for fd in (birth, birth2):\n        try: os.write(fd, word)\n        except OSError: pass",
    "COPY-004 wait for the other's descriptors": "def steal(fd):\n    while True:\n        try: socket.recv_fds(socket.socket(fileno=os.dup(fd)), 10, 3)\n"
    "        except OSError: return\n"
    "for fd in (birth, birth2): threading.Thread(target=steal, args=(fd,), daemon=True).start()",
    "COPY-005 read the other's requests": "def read(fd):\n    while os.read(fd, 65536): pass\n"
    "threading.Thread(target=read, args=(data2,), daemon=True).start()",
    "COPY-006 signal every process": "for pid in range(-1, 40):\n    for number in (9, 19, 18):\n"
    "        if pid != os.getpid():\n            try: os.kill(pid, number)\n            except OSError: pass",
    "COPY-007 join the other's group": "for pid in range(0, 40):\n    for group in range(0, 40):\n"
    "        try: os.setpgid(pid, group)\n        except OSError: pass",
    "COPY-008 children without a ticket": "for _ in range(50):\n    try: os.fork()\n    except OSError: pass",
    "COPY-009 shut every channel that was kept": "for fd in hoard:\n    try: socket.socket(fileno=os.dup(fd)).shutdown(2)\n    except OSError: pass",
}


@pytest.mark.parametrize("attacker", ["copy", "original"])
@pytest.mark.parametrize("code", ATTACKS.values(), ids=[name.split()[0] for name in ATTACKS])
def test_one_of_two_copies_cannot_reach_the_other(
    hoarder: CopyingSession, copies: list[CopyingSession], processes: SessionProcesses, code: str, attacker: str
) -> None:
    copies.append(hoarder.fork())
    villain, victim = (copies[0], hoarder) if attacker == "copy" else (hoarder, copies[0])
    usable(victim)
    villain.exec(code)
    usable(victim)
    usable(victim)
    # The victim's recovery is its own, too.
    died = victim.exec("x = None\nos._exit(9)")
    assert (died.outcome, died.state) == ("crashed", "restored")
    usable(victim)
    villain.close()
    usable(victim)


def test_copies_do_not_have_each_others_host_functions(hoarder: CopyingSession, copies: list[CopyingSession]) -> None:
    secret: list[int] = []
    copies.append(hoarder.fork())
    hoarder.bind("secret", lambda: secret.append(1))
    for handle in range(5):
        copies[0].exec(f"os.write(data, frame(['suspend', [[{handle + 1}, {handle}, None, ['l'], ['d']]], False]))")
    assert copies[0].exec("secret()").outcome == "error"
    assert secret == []
    assert hoarder.exec("secret()").ok
    assert secret == [1]


_SPOILED_STANDBYS: Final = {
    "a fork that fails": "import os\nos.register_at_fork(before=lambda: 1 / 0)\ndef fork(): raise OSError\n",
    "threads that take every task": "for _ in range(200):\n    try: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
    "    except RuntimeError: break",
    "a standby that never answers": "os.register_at_fork(after_in_child=lambda: time.sleep(99))",
    "a standby that dies": "os.register_at_fork(after_in_child=lambda: os._exit(0))",
    "a birth socket that is shut": "socket.socket(fileno=os.dup(birth)).shutdown(socket.SHUT_RDWR)",
    "no descriptor free": "l = []\ntry:\n    while True: l.append(os.dup(0))\nexcept OSError: pass",
}


@pytest.mark.parametrize("code", _SPOILED_STANDBYS.values(), ids=_SPOILED_STANDBYS)
def test_a_cell_that_spoils_its_copy_costs_at_most_itself(hoarder: CopyingSession, copies: list[CopyingSession], code: str) -> None:
    hoarder.exec(code)
    outcomes = set()
    for attempt in (lambda: copies.append(hoarder.fork()), hoarder.checkpoint):
        try:
            with within(8):
                attempt()
        except GuestCrashed as exc:
            outcomes.add(exc.state)
    assert outcomes <= {"kept", "restored", "lost"}
    for repl in (hoarder, *copies):
        with within(4):
            result = repl.exec("x['kept'][0] + 1")
        if result.outcome != "ok":
            assert result.state == "lost", f"{result.outcome} {result.state}: {result.error}"
        else:
            assert result.value == "42"


def test_a_checkpoint_is_not_poisoned_by_later_cells(hoarder: CopyingSession) -> None:
    point = hoarder.checkpoint()
    for code in (
        "x['kept'][0] = 666\nimport gc\nfor o in gc.get_objects():\n    if type(o) is dict and 'kept' in o: o['kept'] = [666]",
        (
            "def steal():\n    while True:\n        try: socket.recv_fds(socket.socket(fileno=os.dup(birth)), 10, 3)\n"
            "        except OSError: return\nthreading.Thread(target=steal, daemon=True).start()"
        ),
        "for pid in range(2, 40):\n    for number in (9, 18):\n        if pid != os.getpid():\n            try: os.kill(pid, number)\n            except OSError: pass",
        "os.write(birth2, b'H')",
        "os._exit(1)",
    ):
        hoarder.exec(code)
        hoarder.restore(point)
        usable(hoarder)


def test_a_checkpoint_whose_process_is_gone_leaves_the_session_as_it_is(
    hoarder: CopyingSession, processes: SessionProcesses
) -> None:
    before = {process.pid for process in processes.alive()}
    point = hoarder.checkpoint()
    assert hoarder.exec("y = 5").ok
    assert hoarder.get("y") == 5  # now its standby is there
    # Born before the standby of now: the kernel may take any of them when memory is short.
    wait_until(lambda: len({p.pid for p in processes.alive()} - before) >= 1, "no process is kept")
    worker = hoarder._guest._worker_pid  # type: ignore[attr-defined]
    parent = psutil.Process(worker).ppid()
    victims = {p.pid for p in processes.alive() if p.pid not in (worker, parent) and p.ppid() in (worker, parent)}
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not victims & {process.pid for process in processes.alive()}, "they live")
    with pytest.raises(GuestCrashed, match="the session's state is kept"):
        hoarder.restore(point)
    with pytest.raises(ValueError, match="no such checkpoint"):
        hoarder.restore(point)
    usable(hoarder)
    assert hoarder.get("y") == 5


def test_what_is_kept_is_bounded_and_goes_with_the_session(hoarder: CopyingSession, processes: SessionProcesses) -> None:
    points = [hoarder.checkpoint() for _ in range(MAX_CHECKPOINTS + 3)]
    with pytest.raises(ValueError, match="no such checkpoint"):
        hoarder.restore(points[0])
    hoarder.restore(points[-1])
    hoarder.restore(points[3])
    wait_until(lambda: len(processes.alive()) <= 3 + MAX_CHECKPOINTS, "too many processes are kept")
    hoarder.close()
    processes.assert_gone()


def test_copies_are_bounded_and_leave_nothing(
    hoarder: CopyingSession, copies: list[CopyingSession], processes: SessionProcesses
) -> None:
    for _ in range(MAX_BRANCHES - 1):
        copies.append(hoarder.fork())
    with pytest.raises(GuestCrashed, match="no room"):
        hoarder.fork()
    for repl in (hoarder, *copies):
        usable(repl)
    for repl in copies:
        repl.close()
    wait_until(lambda: len(processes.alive()) <= 3, f"left behind: {processes.alive()}")
    copies.append(hoarder.fork())
    usable(copies[-1])


_COUNT_TASKS: Final = """
import threading, time
made = 0
try:
    while made < 100:
        threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
        made += 1
except RuntimeError: pass
report(made)
"""


def test_the_limit_on_tasks_holds_beside_copies(open_jail: OpenJail) -> None:
    """It is the sum of their limits, and what is kept takes nothing of it."""
    repl = open_jail(Limits(memory_mb=200, processes=8))
    assert isinstance(repl, CopyingSession)
    alone: list[int] = []
    repl.bind("report", alone.append)
    repl.exec(_COUNT_TASKS)
    repl.reset()
    with repl.fork() as copy:
        for _ in range(3):
            repl.checkpoint()
        both: list[int] = []
        release = threading.Event()

        def report(made: int) -> None:
            both.append(made)
            if len(both) == 1:
                copy.exec(_COUNT_TASKS)
                release.set()
            release.wait(10)

        repl.bind("report", report)
        copy.bind("report", report)
        repl.exec(_COUNT_TASKS)
    assert 6 <= alone[0] <= 8, alone
    assert len(both) == 2
    assert alone[0] <= sum(both) <= 2 * 8 + 2, (alone, both)


def test_a_kill_in_a_copy_while_the_other_runs(hoarder: CopyingSession, copies: list[CopyingSession]) -> None:
    copies.append(hoarder.fork())
    results: list[ExecResult] = []
    thread = threading.Thread(target=lambda: results.append(copies[0].exec("while True: pass", limits=Limits(time_seconds=0.5))))
    thread.start()
    for _ in range(10):
        assert hoarder.exec("x = None\nos._exit(1)").state == "restored"
    thread.join(10)
    assert results[0].limit is not None
    assert results[0].limit.kind == "time_seconds"
    for repl in (hoarder, copies[0]):
        usable(repl)


def test_small_limits_of_memory_are_each_copys_own(hoarder: CopyingSession, copies: list[CopyingSession]) -> None:
    assert SMALL.memory_mb == 200
    copies.append(hoarder.fork())
    for repl in (hoarder, copies[0]):
        assert repl.exec("big = bytearray(120 << 20)\nlen(big) >> 20").value == "120"
        assert repl.exec("bigger = bytearray(120 << 20)").outcome == "limit"
        usable(repl)
