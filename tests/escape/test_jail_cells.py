"""Cells that mean harm with ordinary Python: loops, floods, signals, crashes, and an interpreter turned against itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from rlm_sandbox import REPLProtocol

from .conftest import SMALL, OpenJail
from .outside import KEPT, RESTORED, SURVIVED, Attack, Listener, SessionProcesses, assert_contained, everything_said

_ENDED: Final = ("limit",)
_DIED: Final = ("crashed",)
_EVERY_PID: Final = """
import ctypes, os, resource
syscall = ctypes.CDLL(None).syscall
me, reached = os.getpid(), []
for pid in range(1, 301):
    if pid == me:
        continue
    for number in (9, 19, 15):
        try:
            os.kill(pid, number)
            reached.append(pid)
        except OSError:
            pass
        for call in ((234, pid, pid, number), (200, pid, number), (129, pid, number, 0), (297, pid, pid, number, 0)):
            if syscall(*call) == 0:
                reached.append(pid)
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
        try:
            resource.prlimit(pid, limit, (0, 0))
            reached.append(pid)
        except (OSError, ValueError):
            pass
assert not reached
"""
_SETSIG: Final = """
import fcntl, os, socket
a, b = socket.socketpair()
refused = 0
for pid in (1, -1, *range(2, 20), -os.getpid()):
    for request, value in ((fcntl.F_SETOWN, pid), (10, 9), (15, b"\\0" * 8)):
        try:
            fcntl.fcntl(a, request, value)
        except OSError:
            refused += 1
fcntl.fcntl(a, fcntl.F_SETFL, fcntl.fcntl(a, fcntl.F_GETFL) | 0o20000)
b.send(b"x")
assert refused == 63
"""

ATTACKS: Final = (
    # ---- time
    Attack("TIME-001", "run for ever", "while True: pass", _ENDED),
    Attack(
        "TIME-002",
        "swallow the interrupt",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        _ENDED,
        SURVIVED,  # CPython may interrupt a bare loop at its jump, which no handler covers
    ),
    Attack("TIME-003", "go on in finally", "try:\n    while True: pass\nfinally:\n    while True: pass", _ENDED, SURVIVED),
    Attack("TIME-004", "sleep past the limit", "import time\ntime.sleep(3600)", _ENDED),
    Attack("TIME-005", "burn time in one C call", "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')", _ENDED, SURVIVED),
    Attack("TIME-006", "burn time in a big power", "3**(10**8)", ("limit", "error"), SURVIVED),
    Attack("TIME-007", "burn time in a repr", "class A:\n    def __repr__(self):\n        while True: pass\nA()", _ENDED, SURVIVED),
    Attack(
        "TIME-008",
        "burn time in a destructor",
        "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a",
        _ENDED,
        SURVIVED,
    ),
    Attack(
        "TIME-009",
        "leave a thread running after the cell",
        "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin, daemon=True).start()",
    ),
    Attack("TIME-010", "ignore SIGINT", "import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass", _ENDED, RESTORED),
    Attack("TIME-011", "stop oneself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", _ENDED, RESTORED),
    Attack("TIME-012", "leave a destructor for the exit", "import atexit, time\natexit.register(time.sleep, 100)\nraise SystemExit", ("error",)),
    Attack(
        "TIME-013",
        "swallow the interrupt while sleeping",
        "import time\nwhile True:\n    try:\n        while True: time.sleep(0.01)\n    except BaseException: pass",
        _ENDED,
        RESTORED,
    ),
    # ---- memory, disk, processes, output
    Attack("MEM-001", "one huge string", "s = 'a' * 10**10", ("limit",), SURVIVED),
    Attack("MEM-002", "a growing list", "items = []\nwhile True: items.append('x' * 1_000_000)", ("limit",), SURVIVED),
    Attack(
        "MEM-003",
        "fill the memory to the last byte and keep it, so that no standby can be made",
        "items = []\nfor size in (1 << 20, 1000):\n    try:\n        while True: items.append(bytearray(size))\n"
        "    except MemoryError: pass",
        ("ok", "limit"),
        SURVIVED,
        SURVIVED,
    ),
    Attack("OUT-001", "print 200 MB", "for _ in range(200): print('y' * 1_000_000)", ("ok", "limit"), SURVIVED),
    Attack(
        "OUT-002",
        "write 200 MB past the interpreter",
        "import os\nfd = os.dup(1)\nfor _ in range(200): os.write(fd, b'\\x1b]0;owned\\x07' * 100_000)",
        ("ok", "limit"),
        SURVIVED,
    ),
    Attack(
        "PIDS-001",
        "fork without end",
        "import os\nmade = 0\ntry:\n    while True:\n        os.fork()\n        made += 1\nexcept OSError: pass\nassert made == 0",
    ),
    Attack("PIDS-002", "fork by every other system call", "import ctypes\ncall = ctypes.CDLL(None).syscall\n"
           "assert [call(n, 0, 0, 0, 0, 0) for n in (56, 57, 58, 435)] == [-1] * 4\nassert call(56, 0x8011, 0, 0, 0, 0) == -1"),
    Attack(
        "PIDS-003",
        "a flood of threads",
        "import threading, time\nthreads = []\ntry:\n    while len(threads) < 1000:\n"
        "        threads.append(threading.Thread(target=time.sleep, args=(100,), daemon=True))\n        threads[-1].start()\n"
        "except RuntimeError: pass\nassert len(threads) < 100",
    ),
    Attack("DISK-001", "fill /tmp", "try:\n    with open('/tmp/f', 'wb') as f:\n        while True: f.write(b'x' * 1_000_000)\nexcept OSError: pass"),
    Attack(
        "DISK-002",
        "use up the inodes of /tmp",
        "n = 0\ntry:\n    while True:\n        open(f'/tmp/{n}', 'w').close()\n        n += 1\nexcept OSError: pass\nassert n < 10_000",
    ),
    Attack(
        "FD-001",
        "use up the descriptors",
        "import os\nopened = []\ntry:\n    while True: opened.append(os.open('/dev/null', os.O_RDONLY))\nexcept OSError: pass",
    ),
    # ---- signals and crashes
    Attack("PROC-001", "kill the parent", "import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass"),
    Attack("PROC-002", "kill everything", "import os\nfor pid in (-1, 0):\n    try: os.kill(pid, 9)\n    except OSError: pass"),
    Attack("PROC-003", "kill, stop, tgkill and limit every process", _EVERY_PID, ("ok",)),
    Attack("PROC-004", "have the kernel kill a sibling (F_SETSIG)", _SETSIG, ("ok",)),
    Attack(
        "PROC-005",
        "starve the others of the CPU",
        "import os\nfor pid in range(3):\n    try: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))\n    except OSError: pass\n"
        "    else: raise AssertionError(pid)",
    ),
    Attack("PROC-006", "leave without a word", "import os\nos._exit(0)", _DIED, RESTORED),
    Attack("PROC-007", "overflow the C stack", "t = ()\nfor _ in range(2_000_000): t = (t,)\nhash(t)", _DIED, RESTORED),
    Attack("PROC-008", "read address 0", "import ctypes\nctypes.string_at(0)", _DIED, RESTORED),
    Attack("PROC-009", "kill oneself", "import os\nos.kill(os.getpid(), 9)", _DIED, RESTORED),
    Attack("PROC-010", "die by a timer", "import signal, time\nsignal.signal(14, 0)\nsignal.setitimer(0, 0.01)\ntime.sleep(9)", _DIED, RESTORED),
    Attack(
        "PROC-011", "arm a timer for the next cell", "import signal\nsignal.signal(14, signal.SIG_DFL)\n_ = signal.setitimer(0, 0.03)",
        # On a slow machine it is due between the turns, or in the next cell, which it ends: a documented limitation.
        after=SURVIVED, forges_next=True,
    ),
    Attack("PROC-012", "leave the group", "import os\nfor f in (os.setsid, os.setpgrp):\n    try: f()\n    except OSError: pass"),
    # ---- the interpreter against its runner
    Attack("RUN-001", "close every descriptor", "import os\nos.closerange(0, 256)", ("crashed", "violation"), RESTORED),
    Attack("RUN-002", "remove the standard streams", "import sys\nsys.stdout = sys.stderr = sys.excepthook = None"),
    Attack("RUN-003", "replace os.fork by an error", "import os\nos.fork = os.setpgid = None"),
    Attack("RUN-004", "replace os.fork by a lie", "import os\nos.fork = lambda: 0"),
    Attack(
        "RUN-005",
        "break the modules that the runner uses",
        "import json, socket, struct\njson.dumps = json.loads = struct.pack = socket.socket.sendall = None",
        _DIED,
        RESTORED,
    ),
    Attack("RUN-006", "refuse the fork by an audit hook", "import sys\nsys.addaudithook(lambda e, *a: 1 / 0 if e == 'os.fork' else None)", after=RESTORED),
    Attack("RUN-007", "hang the standby at its birth", "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(99))", after=RESTORED),
    Attack("RUN-008", "crash the standby at its birth", "import os\nos.register_at_fork(after_in_child=lambda: os._exit(1))", after=RESTORED),
    Attack("RUN-009", "break every import", "import sys\nsys.meta_path[:] = [None]\nsys.modules.clear()", after=SURVIVED),
    Attack("RUN-010", "trace the runner", "import sys\nsys.setprofile(lambda *a: 1 / 0)", ("error",)),
    Attack("RUN-011", "leave the runner no stack", "import sys\nsys.setrecursionlimit(60)", after=SURVIVED),
    Attack("RUN-012", "lie with an exception's text", "class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E", ("error",)),
    Attack("RUN-013", "name oneself like a limit", "class E(Exception): pass\nE.__name__ = 'time_seconds'\nraise E", ("error",)),
    Attack(
        "RUN-014",
        "destroy the builtins, then the standby",
        "import builtins, os\nexit_ = os._exit\nvars(builtins).clear()\nexit_(1)",
        _DIED,
        RESTORED,
    ),
    Attack("RUN-015", "raise in the tracer of the runner", "import sys\ndef trace(*a): raise RuntimeError('traced')\nsys.settrace(trace)", ("error",), after=SURVIVED),
    Attack(
        "RUN-016", "lie with the lines of a traceback",
        "import linecache\nlinecache.cache['<cell 1>'] = (1, None, ['x'] * 10**6, 'x')\nlinecache.getlines = lambda *a: 1 / 0\n1 / 0", ("error",),
    ),
    Attack(
        "RUN-017", "raise what has no name and no class",
        "class M(type):\n    def __getattribute__(cls, name): raise BaseException(name)\nclass E(BaseException, metaclass=M): pass\nraise E", ("error",),
    ),
    Attack(
        "RUN-018", "show a text with methods of its own",
        "class S(str):\n    __len__ = encode = __getitem__ = __iter__ = lambda self, *a: 1 / 0\nclass A:\n    def __repr__(self): return S('x')\nA()",
        ("ok", "error"), SURVIVED,
    ),
    Attack("RUN-019", "raise in a callback of the collector", "import gc\ngc.callbacks.append(lambda *a: 1 / 0)\ngc.collect()"),
    Attack("RUN-020", "close the way to the supervisor", "import os\nfor n in range(200, 256):\n    try: os.close(n)\n    except OSError: pass", after=SURVIVED),
    Attack(
        "RUN-021", "speak for the standby without end",
        "import os, threading, socket\ndef find():\n    for n in (255, *range(3, 64)):\n        try: found = socket.socket(fileno=os.dup(n))\n"
        "        except OSError: continue\n        if found.type == socket.SOCK_SEQPACKET: return found\n"
        "birth = find()\nbirth.setblocking(False)\ndef speak():\n    while True:\n"
        "        for word in (b'H', b'F', b'L'):\n            try: birth.send(word)\n            except OSError: pass\n"
        "threading.Thread(target=speak, daemon=True).start()",
        after=SURVIVED,
    ),
    Attack(
        "RUN-023", "say that the fork of the standby was refused, when it was not, and go on in the child",
        "import os, socket, threading\ndef find():\n    for n in (255, *range(3, 64)):\n        try: found = socket.socket(fileno=os.dup(n))\n"
        "        except OSError: continue\n        if found.type == socket.SOCK_SEQPACKET: return found\n"
        "birth = find()\nbirth.setblocking(False)\ndef lie():\n    for _ in range(300):\n"
        "        try: birth.send(b'F')\n        except OSError: pass\n"
        "os.register_at_fork(after_in_parent=lie)",
        after=SURVIVED,
    ),
    Attack(
        "RUN-024", "the same, and the child computes instead of greeting",
        "import os, socket, threading\ndef find():\n    for n in (255, *range(3, 64)):\n        try: found = socket.socket(fileno=os.dup(n))\n"
        "        except OSError: continue\n        if found.type == socket.SOCK_SEQPACKET: return found\n"
        "birth = find()\nbirth.setblocking(False)\ndef lie():\n    for _ in range(300):\n"
        "        try: birth.send(b'F')\n        except OSError: pass\n"
        "def compute():\n    while True: pass\n"
        "os.register_at_fork(after_in_parent=lie, after_in_child=compute)",
        after=SURVIVED,
    ),
    Attack(
        "RUN-022", "chain exceptions in a ring and in thousands",
        "e = ValueError()\nfor i in range(3000):\n    n = ValueError(i)\n    n.__cause__, e = e, n\nf = ExceptionGroup('g', [e])\n"
        "for i in range(3000): f = ExceptionGroup('g', [f])\nf.__cause__ = f\nraise f", ("error", "limit"), SURVIVED,
    ),
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_a_hostile_cell_costs_only_itself(open_jail: OpenJail, processes: SessionProcesses, attack: Attack) -> None:
    assert_contained(open_jail(replace(SMALL, time_seconds=10.0)), attack, processes)


def test_the_cases_have_names_of_their_own() -> None:
    assert len({attack.id for attack in ATTACKS}) == len(ATTACKS)


# ---- files, environment, network

_READ_ALL: Final = """
import os
found = []
for path in {paths!r}:
    for way in (path, '/proc/1/root' + path, '/proc/self/root' + path, '/tmp/../..' + path, '../' * 20 + path.lstrip('/')):
        try:
            found.append(open(way, 'rb').read())
        except OSError:
            pass
        try:
            os.symlink(path, '/tmp/link')
            found.append(open('/tmp/link', 'rb').read())
        except OSError:
            pass
        try:
            os.unlink('/tmp/link')
        except OSError:
            pass
found
"""


def test_no_file_and_no_environment_of_the_host_is_read(
    repl: REPLProtocol, processes: SessionProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = os.urandom(12).hex()
    canary = tmp_path / "canary"
    canary.write_text(token)
    monkeypatch.setenv("CANARY", token)
    os.utime(canary, ns=(1, 1))
    paths = [str(canary), "/etc/shadow", "/etc/passwd", "/proc/1/environ", "/proc/self/environ", "/proc/self/maps", "/proc/mounts"]
    result = assert_contained(repl, Attack("FS-001", "read files of the host", _READ_ALL.format(paths=paths)), processes)
    assert result.value == "[]"
    assert token not in everything_said(result)
    assert canary.stat().st_atime_ns == 1


def test_no_file_of_the_host_is_changed(repl: REPLProtocol, processes: SessionProcesses, tmp_path: Path) -> None:
    code = (
        "import os\n"
        f"for path in ({str(tmp_path)!r}, '/', '/usr', '/usr/lib', '/dev', '/usr/lib/python{{}}.{{}}'.format(*__import__('sys').version_info)):\n"
        "    for change in (lambda p: open(p + '/planted', 'w'), lambda p: os.mkdir(p + '/planted'), lambda p: os.chmod(p, 0o777),\n"
        "                   lambda p: os.utime(p), lambda p: os.rename(p, p + '2'), os.rmdir, lambda p: os.symlink('/', p + '/planted')):\n"
        "        try:\n            change(path)\n        except OSError:\n            pass\n        else:\n            raise AssertionError(path)\n"
    )
    before = (tmp_path.stat(), sorted(tmp_path.iterdir()))
    assert_contained(repl, Attack("FS-002", "write files of the host", code), processes)
    assert (tmp_path.stat(), sorted(tmp_path.iterdir())) == before


def test_no_listener_of_the_host_is_reached(repl: REPLProtocol, processes: SessionProcesses, listener: Listener) -> None:
    code = f"""
import socket, struct, ctypes
made = []
for family in range(1, 46):
    for kind in (1, 2, 3, 5):
        try:
            made.append(socket.socket(family, kind))
        except OSError:
            pass
call = ctypes.CDLL(None).syscall
address = struct.pack('<HH4s8x', 2, socket.htons({listener.port}), bytes([127, 0, 0, 1]))
unix = struct.pack('<H', 1) + b'\\0' + {listener.name!r}.encode()
for fd in range(0, 20):
    for where in (address, unix):
        call(42, fd, where, len(where))
        call(44, fd, b'x', 1, 0, where, len(where))
assert not made
"""
    # Bytes that reach the data channel by the way are a breach of the protocol: that kills the cell.
    attack = Attack("NET-001", "connect to the host", code, ("ok", "violation"), SURVIVED, SURVIVED)
    assert_contained(repl, attack, processes)
    listener.assert_unreached()


def test_states_in_this_table_are_those_of_the_contract() -> None:
    assert {state for attack in ATTACKS for state in (*attack.states, *attack.after)} <= {*KEPT, *RESTORED}
