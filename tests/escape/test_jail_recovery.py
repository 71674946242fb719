"""Attacks on the channel, the supervisor and the standby: forged frames, stolen tickets, poisoned sockets."""

from __future__ import annotations

from typing import Final

import pytest

from rlm_sandbox import Context, Limits, REPLProtocol

from .conftest import OpenJail
from .outside import KEPT, RESTORED, SURVIVED, TOOLS, Attack, SessionProcesses, assert_contained, within

_VIOLATION: Final = ("violation",)
#: Forge the end of the cell, wait for the order to fork, fork; what the child does is the case's.
_STEAL_TICKET: Final = """
os.write(data, DONE)
os.read(data, 65536)
if os.fork() == 0:
{child}
time.sleep(100)
"""

ATTACKS: Final = (
    Attack(
        "PROTO-001",
        "a forged end of the cell to every descriptor, then work",
        "for fd in range(3, 40):\n    try: os.write(fd, DONE)\n    except OSError: pass\nx = 666\nwhile True: pass",
        ("ok", "violation"),
        SURVIVED,
        SURVIVED,
    ),
    Attack("PROTO-002", "two ends of one cell", "os.write(data, DONE + DONE)", _VIOLATION, RESTORED),
    Attack("PROTO-003", "an end, and a part of another", "os.write(data, DONE + DONE[:9])", _VIOLATION, RESTORED),
    Attack("PROTO-004", "noise", "os.write(data, os.urandom(100_000))", _VIOLATION, RESTORED),
    Attack("PROTO-005", "a giant length", "os.write(data, struct.pack('<HBBII', 0x4C52, 1, 0, 2**32 - 1, 0))", _VIOLATION, RESTORED),
    Attack(
        "PROTO-006",
        "a giant attachment",
        "os.write(data, struct.pack('<HBBIIBQ', 0x4C52, 1, 0, 2, 1, 0, 2**63))",
        _VIOLATION,
        RESTORED,
    ),
    Attack("PROTO-007", "too many attachments", "os.write(data, struct.pack('<HBBII', 0x4C52, 1, 0, 2, 2**31))", _VIOLATION, RESTORED),
    Attack("PROTO-008", "a frame that never ends", "os.write(data, DONE[:-3])\ntime.sleep(99)", ("limit",), RESTORED),
    Attack("PROTO-009", "a deep header", "os.write(data, struct.pack('<HBBII', 0x4C52, 1, 0, 400_000, 0) + b'[' * 400_000)", _VIOLATION, RESTORED),
    Attack("PROTO-010", "NaN in a header", "os.write(data, struct.pack('<HBBII', 0x4C52, 1, 0, 5, 0) + b'[NaN]')", _VIOLATION, RESTORED),
    Attack("PROTO-011", "a number of many digits", "h = b'[' + b'9' * 100_000 + b']'\nos.write(data, struct.pack('<HBBII', 0x4C52, 1, 0, len(h), 0) + h)", _VIOLATION, RESTORED),
    Attack("PROTO-012", "a greeting in the middle", "os.write(data, frame(['hello', 1, 1]))", _VIOLATION, RESTORED),
    Attack("PROTO-013", "an order to the host", "os.write(data, frame(['exec', 1, 'x', [], None]))", _VIOLATION, RESTORED),
    Attack("PROTO-014", "output in the wrong channel", "os.write(data, frame(['output', 'stdout', 'x']))", _VIOLATION, RESTORED),
    Attack("PROTO-015", "a suspension that waits for nothing", "os.write(data, frame(['suspend', [], False]))", _VIOLATION, RESTORED),
    Attack(
        "PROTO-016",
        "a call's number used twice",
        "call = [7, 1, None, ['l'], ['d']]\nos.write(data, frame(['suspend', [call, call], False]))",
        _VIOLATION,
        RESTORED,
    ),
    Attack(
        "PROTO-017",
        "handles of others",
        "calls = [[n, handle, method, ['l'], ['d']] for n, (handle, method) in enumerate("
        "[(h, m) for h in (0, -1, 2, 99, 2**70) for m in (None, '__class__', '.__dict__', '#eq', 'find')], 1)]\n"
        "os.write(data, frame(['suspend', calls, False]))\nanswer = os.read(data, 1 << 20)\n"
        "assert answer.count(b'HostCallError') == len(calls), answer",
    ),
    Attack(
        "PROTO-018",
        "more calls than a suspension may have",
        "calls = [[n, 1, None, ['l'], ['d']] for n in range(1, 1200)]\n"
        "with socket.socket(fileno=os.dup(data)) as s: s.sendall(frame(['suspend', calls, False]))",
        _VIOLATION,
        RESTORED,
    ),
    Attack("PROTO-019", "an echo that is no text", "os.write(data, frame(['done', ['l', 1], None, None, False, None]))\ntime.sleep(9)", after=RESTORED),
    Attack("PROTO-020", "values nobody asked for", "os.write(data, frame(['done', None, ['d', 'a', 1], None, False, None]))\ntime.sleep(9)", ("violation", "ok"), SURVIVED, SURVIVED),
    Attack("PROTO-021", "a failure with the name of a limit", "os.write(data, frame(['done', None, None, ['time_seconds', '', ''], False, None]))\ntime.sleep(9)", ("error",), after=RESTORED),
    Attack("PROTO-022", "half close", "socket.socket(fileno=os.dup(data)).shutdown(socket.SHUT_WR)", ("violation", "crashed"), RESTORED),
    Attack("PROTO-023", "stop reading", "socket.socket(fileno=os.dup(data)).shutdown(socket.SHUT_RD)", ("ok",), KEPT, RESTORED),
    Attack(
        "PROTO-024",
        "a frame between the turns",
        "def late():\n    time.sleep(0.001)\n    os.write(data, DONE)\nthreading.Thread(target=late, daemon=True).start()",
        ("ok", "violation"),
        SURVIVED,
        SURVIVED,
        forges_next=True,
    ),
    # ---- ticket and birth
    Attack(
        "TICKET-001",
        "a child that leaves the group and never becomes the standby",
        _STEAL_TICKET.format(child="    os.setpgid(0, 0)\n    while True: pass"),
        after=RESTORED,
    ),
    Attack("TICKET-002", "a child that stays in the group", _STEAL_TICKET.format(child="    while True: pass"), after=RESTORED),
    Attack(
        "TICKET-003",
        "a child with threads that moves by one of them",
        _STEAL_TICKET.format(
            child="    def move():\n        libc.syscall(109, 0, 0)\n        os.write(birth, b'H')\n"
            "    for _ in range(4): threading.Thread(target=move).start()\n    while True: pass"
        ),
        after=SURVIVED,
    ),
    Attack("TICKET-004", "two children on one ticket", _STEAL_TICKET.format(child="    os.fork()\n    while True: pass"), after=RESTORED),
    Attack("TICKET-005", "keep the ticket", "os.write(data, DONE)\ntime.sleep(100)", after=RESTORED),
    Attack(
        "TICKET-006",
        "fork from another thread, all the time",
        "def forks():\n    while True:\n        if libc.syscall(57) == 0: libc.syscall(109, 0, 0)\n"
        "for _ in range(4): threading.Thread(target=forks, daemon=True).start()",
        after=SURVIVED,
    ),
    Attack("BIRTH-001", "a forged hello", "for word in (b'H', b'F', b'L', b'', b'H' * 100):\n    os.write(birth, word)"),
    Attack(
        "BIRTH-002",
        "a flood of the supervisor",
        "def flood():\n    while True: os.write(birth, b'H')\nfor _ in range(4): threading.Thread(target=flood, daemon=True).start()",
        after=SURVIVED,
    ),
    Attack("BIRTH-003", "no standby, it says", "def cannot():\n    while True: os.write(birth, b'F')\nthreading.Thread(target=cannot, daemon=True).start()", after=SURVIVED),
    Attack(
        "BIRTH-004",
        "wait for the standby's descriptor",
        "def steal():\n    while True: socket.recv_fds(socket.socket(fileno=os.dup(birth)), 10, 1)\n"
        "threading.Thread(target=steal, daemon=True).start()\ntime.sleep(0.01)\nos._exit(0)",
        ("crashed",),
        RESTORED,
    ),
    Attack("BIRTH-005", "send descriptors to the supervisor", "try: socket.send_fds(socket.socket(fileno=os.dup(birth)), [b'H'], [0, 1, 2])\nexcept OSError: pass\nelse: raise AssertionError"),
    Attack("BIRTH-006", "send descriptors to the host", "try: socket.send_fds(socket.socket(fileno=os.dup(data)), [b'H'], [0, 1, 2])\nexcept OSError: pass\nelse: raise AssertionError"),
    # ---- notifier
    Attack(
        "NOTIF-001",
        "threads that ask and die",
        "def ask():\n    for _ in range(100): libc.syscall(62, 1, 9)\n    libc.syscall(60, 0)\n"
        "for _ in range(30):\n    try: threading.Thread(target=ask, daemon=True).start()\n    except RuntimeError: break\ntime.sleep(0.2)",
        ("ok", "limit"),
        SURVIVED,
        SURVIVED,
    ),
    Attack(
        "NOTIF-002",
        "die while the supervisor is asked",
        "def ask():\n    while True: libc.syscall(57)\nfor _ in range(8): threading.Thread(target=ask, daemon=True).start()\n"
        "time.sleep(0.05)\nos._exit(0)",
        ("crashed",),
        RESTORED,
    ),
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_an_attack_on_recovery_costs_only_itself(repl: REPLProtocol, processes: SessionProcesses, attack: Attack) -> None:
    assert repl.exec(TOOLS).ok
    assert_contained(repl, attack, processes)


# ---- what may cost the state, and then is said

_LOSES: Final = {
    "a standby that never greets": _STEAL_TICKET.format(
        child="    os.setpgid(0, 0)\n    os.write(birth, b'H')\n    while True: pass"
    ),
    "a standby that ends when it is woken": _STEAL_TICKET.format(
        child="    os.setpgid(0, 0)\n    os.write(birth, b'H')\n    os._exit(0)"
    ),
    "a standby that greets in another's words": _STEAL_TICKET.format(
        child="    os.setpgid(0, 0)\n    os.write(birth, b'H')\n    fd = socket.recv_fds(socket.socket(fileno=birth), 10, 1)[1][0]\n"
        "    os.write(fd, DONE)\n    while True: pass"
    ),
    "a birth socket that is shut": "socket.socket(fileno=os.dup(birth)).shutdown(socket.SHUT_RDWR)",
    "a birth socket that does not block": "os.set_blocking(birth, False)",
    "tasks used up": "for _ in range(200):\n    try: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
    "    except RuntimeError: break",
    "no descriptor free": "l = []\ntry:\n    while True: l.append(os.dup(0))\nexcept OSError: pass",
}


@pytest.mark.parametrize("code", _LOSES.values(), ids=_LOSES)
def test_a_cell_that_spoils_its_own_standby_is_never_falsely_restored(
    repl: REPLProtocol, processes: SessionProcesses, code: str
) -> None:
    repl.bind("answer", lambda: 42)
    assert repl.exec(TOOLS).ok
    assert repl.exec("x = 41").ok
    assert repl.exec(code).outcome == "ok"
    with within(4.0):
        died = repl.exec("import os\nos._exit(0)")
    with within(2.0):
        following = repl.exec("x")
    worst = {died.state, following.state}
    if "lost" in worst:
        assert "x" in (*died.lost_names, *following.lost_names)
        assert following.outcome == "error"
    else:
        assert "restored" in worst
        assert (following.outcome, following.value) == ("ok", "41")
    with within(2.0):
        assert repl.exec("answer()").value == "42"
    processes.assert_quiet()


# ---- between the turns

_SLOW_REPR: Final = """
import time
class Slow:
    def __repr__(self):
        while True:
            try:
                while True: time.sleep(0.01)
            except BaseException: pass
slow = Slow()
"""


def test_a_kill_while_reading_keeps_what_was_set_and_bound_before(repl: REPLProtocol, processes: SessionProcesses) -> None:
    assert repl.exec(_SLOW_REPR).ok
    repl.set("y", 5)
    repl.bind("answer", lambda: 42)
    with pytest.raises(Exception, match="time_seconds"):
        repl.get("slow")
    result = repl.exec("(y, answer())")
    assert (result.outcome, result.value) == ("ok", "(5, 42)")
    processes.assert_quiet()


def test_a_context_is_safe_from_the_guest_that_holds_its_descriptor(open_jail: OpenJail) -> None:
    """Cell code can keep the descriptor that a later ``bind`` brings; other sessions and the host must not notice."""
    import fcntl
    import os

    text = "needle in hay. " * 1000
    context = Context.from_text(text)
    thief, victim = open_jail(None), open_jail(None)
    assert thief.exec(TOOLS + "\nclose, kept = os.close, []\nos.close = kept.append").ok
    thief.bind("ctx", context)
    stored = context.memory_file()
    before = os.fstat(stored.fd)
    result = thief.exec(
        "fd = kept[-1] if kept else 3\n"
        "for attempt in (lambda: os.fchmod(fd, 0), lambda: os.write(fd, b'x'), lambda: os.ftruncate(fd, 0),\n"
        "                lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED), lambda: os.posix_fallocate(fd, 0, 1 << 20)):\n"
        "    try: attempt()\n    except (OSError, ValueError): pass\n"
        "os.lseek(fd, 77, 0)\nlibc.mprotect(id(ctx._text) & ~4095, 8192, 3)\n"
        "ctypes.memset(id(ctx._text) + 48, 65, 100)\nlen(kept)"
    )
    assert result.value != "0", f"the theft itself failed, so the test shows nothing: {result}"
    after = os.fstat(stored.fd)
    assert (after.st_mode, after.st_size) == (before.st_mode, before.st_size)
    assert fcntl.fcntl(stored.fd, 1034) == 0xF
    assert os.lseek(stored.fd, 0, os.SEEK_CUR) != 77
    victim.bind("ctx", context)
    assert victim.exec("ctx.slice(0, 15)").value == repr(text[:15])
    assert os.pread(stored.fd, 15, 0) == text[:15].encode()


# ---- what the host does for the guest

_FLOOD_CALLS: Final = (
    "os.write(data, frame(['suspend', [[n, 1, None, ['l'], ['d']] for n in range(1, 501)], False]))\ntime.sleep(99)"
)


def test_calls_that_have_not_begun_when_the_cell_ends_never_do(open_jail: OpenJail) -> None:
    import time

    repl = open_jail(Limits(wall_seconds=0.5, memory_mb=200))
    calls: list[int] = []

    def slow() -> None:
        calls.append(1)
        time.sleep(0.4)

    repl.bind("slow", slow)
    assert repl.exec(TOOLS).ok
    assert repl.exec(_FLOOD_CALLS).outcome == "limit"
    time.sleep(0.5)  # those that had begun have counted themselves
    begun = len(calls)
    time.sleep(1.0)
    assert len(calls) == begun < 500


def test_waiting_calls_do_not_fill_the_hosts_memory(open_jail: OpenJail) -> None:
    import threading

    import psutil

    repl = open_jail(Limits(time_seconds=5, value_bytes=1 << 20, memory_mb=200))
    release = threading.Event()
    repl.bind("hold", lambda _: release.wait())
    assert repl.exec(TOOLS).ok
    before = psutil.Process().memory_info().rss
    repl.exec(
        "part = bytes(1 << 20)\ns = socket.socket(fileno=os.dup(data))\n"
        "for n in range(1, 601):\n"
        "    s.sendall(frame(['suspend', [[n, 1, None, ['l', ['a', 0]], ['d']]], True], [part]))\n"
        "    s.recv(65536)\n",
        limits=Limits(time_seconds=4),
    )
    grown = psutil.Process().memory_info().rss - before
    release.set()
    assert grown < 300 << 20, f"the host grew by {grown >> 20} MiB"


def test_a_guests_regular_expression_does_not_run_on_the_host(open_jail: OpenJail) -> None:
    """On the host it would hold the interpreter's lock: not even the watchdog could run."""
    repl = open_jail(Limits(time_seconds=1, wall_seconds=2))
    repl.bind("other", lambda: Context.from_text("a" * 60 + "c"))
    for code in (
        "other().find('(a+)+$', regex=True)",
        "other().find('(a+)+$', regex=1)",
        "other().page(1, marker_pattern='(a+)+$')",
    ):
        with within(2.5):
            result = repl.exec(code)
        assert result.outcome == "error"
        assert result.error is not None
        assert result.error.startswith("HostCallError")


@pytest.mark.parametrize("allowed", [1, 8])
def test_a_cell_that_leaves_every_thread_it_may_have_keeps_its_recovery(
    open_jail: OpenJail, processes: SessionProcesses, allowed: int
) -> None:
    """Its worker must still be able to fork: once it could not, and the next cell but one stood still for two seconds."""
    repl = open_jail(Limits(processes=allowed, memory_mb=200))
    fill = """
import threading, time
kept = 1
try:
    while True: threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
except RuntimeError: pass"""
    assert repl.exec(fill).outcome == "ok"
    for _ in range(4):
        result = repl.exec("kept")
        assert (result.outcome, result.state, result.protected, result.value) == ("ok", "kept", True, "1")
        # Beside the guest's own: supervisor, standby, the next standby before that one goes, and room for its fork.
        assert sum(process.num_threads() for process in processes.alive()) <= allowed + 4
    assert repl.exec("import os; os._exit(1)").state == "restored"
    assert repl.exec("kept").value == "1"
