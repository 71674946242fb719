"""Two sessions from one zygote: what one does to its interpreter, its files and its kernel objects, the other never sees."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

import pytest

from rlm_sandbox import Limits

from .conftest import OpenJail
from .outside import TOOLS, SessionProcesses, wait_until

#: What a session finds at its start, as far as another could have touched it.
_FINGERPRINT: Final = """
import builtins, gc, hashlib, json, locale, os, re, resource, signal, sys, threading, time
def fingerprint():
    return {
        'tmp': sorted(os.listdir('/tmp')), 'env': dict(os.environ), 'cwd': os.getcwd(), 'umask': (os.umask(0o22), os.umask(0o22))[0],
        'recursion': sys.getrecursionlimit(), 'handlers': [str(signal.getsignal(n)) for n in range(1, 32)],
        'mask': sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))), 'threads': threading.active_count(),
        'builtins': sorted(vars(builtins)), 'json': json.dumps({'a': [1, 2.5, None]}), 're': re.findall('a+', 'caaat'),
        'finders': len(sys.meta_path), 'modules': sorted(sys.modules), 'gc': (gc.isenabled(), gc.get_threshold()),
        'locale': locale.setlocale(locale.LC_ALL), 'timer': signal.getitimer(signal.ITIMER_REAL), 'tz': time.tzname,
        'limits': [resource.getrlimit(n) for n in range(10)], 'digest': hashlib.sha256(open(os.__file__, 'rb').read()).hexdigest(),
        'fds': [fd for fd in range(256) if exists(fd)], 'ids': (os.getuid(), os.getgid(), os.getgroups(), os.getppid()),
        'names': sorted(n for n in globals() if not n.startswith('_')), 'hash': hash((1, 2)), 'threshold': sys.getswitchinterval(),
    }
def exists(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
"""
_POISON: Final = """
import atexit, builtins, fcntl, gc, json, locale, os, re, resource, signal, socket, sys, threading, time
for n in range(200): open(f'/tmp/poison{n}', 'w').write('x')
lock = open('/tmp/lock', 'w'); fcntl.lockf(lock, fcntl.LOCK_EX)
os.environ['POISON'] = '1'; os.putenv('POISON', '1'); os.mkdir('/tmp/d'); os.chdir('/tmp/d'); os.umask(0)
sys.setrecursionlimit(5000); sys.setswitchinterval(5); gc.disable(); gc.set_threshold(1)
signal.signal(signal.SIGUSR1, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
builtins.poison = json.poison = lambda *a, **k: 'poison'
re.findall = lambda *a: ['poison']; sys.modules['poison'] = sys; sys.meta_path.insert(0, None)
for _ in range(10): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
pairs = [socket.socketpair() for _ in range(50)]
for a, b in pairs:
    a.setblocking(False)
    try:
        while True: a.send(bytes(60_000))
    except OSError: pass
"""


def test_a_second_session_is_pristine(open_jail: OpenJail) -> None:
    def probe() -> str | None:
        repl = open_jail(Limits(memory_mb=200))
        assert repl.exec(_FINGERPRINT).ok
        found = repl.exec("fingerprint()").value
        repl.close()
        # Where our own handler of signals lies depends on what the zygote had just done when it forked.
        return None if found is None else re.sub(r"at 0x[0-9a-f]+", "", found)

    clean = probe()
    assert clean is not None
    assert "poison" not in clean.lower()
    thief = open_jail(Limits(memory_mb=200))
    assert thief.exec(_POISON).ok
    assert probe() == clean
    thief.close()
    assert probe() == clean


_KINDS: Final = ("user", "pid", "mnt", "net", "ipc", "uts")


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _namespaces(pid: int) -> list[str]:
    return [str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in _KINDS]


def _confined(processes: SessionProcesses) -> list[int]:
    """The sessions' processes: those with a system-call filter, which launcher and zygote, that run no cells, have not."""
    return [process.pid for process in processes.alive() if _status(process.pid)["Seccomp"] == "2"]


def test_sessions_have_namespaces_of_their_own(open_jail: OpenJail, processes: SessionProcesses) -> None:
    """As the host's kernel sees it: no two sessions share one, and none is the host's."""
    for _ in range(2):
        assert open_jail(None).exec("x = 1").ok
    wait_until(lambda: len(_confined(processes)) == 6, "two sessions have a supervisor, a worker and a standby each")
    found = set()
    for pid in _confined(processes):
        with contextlib.suppress(FileNotFoundError):  # an older standby that was just replaced
            found.add(tuple(_namespaces(pid)))
    first, second = found
    assert not set(first) & set(second)
    assert not {*first, *second} & set(_namespaces(os.getpid()))


def test_a_session_is_confined_as_the_kernel_sees_it(open_jail: OpenJail, processes: SessionProcesses) -> None:
    assert open_jail(None).exec("x = 1").ok
    wait_until(lambda: len(_confined(processes)) == 3, "a session has a supervisor, a worker and a standby")
    for pid in _confined(processes):
        status = _status(pid)
        assert status["NoNewPrivs"] == "1"
        assert {status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"] and os.getuid() == 0:
            assert "0" not in status["Uid"].split() + status["Gid"].split()


@pytest.mark.parametrize("disturb", ["sockets", "pipes", "watches", "locks", "threads"])
def test_a_session_at_its_limits_does_not_keep_others_from_theirs(open_jail: OpenJail, disturb: str) -> None:
    """Quotas that the kernel counts for a user: where sessions share one, none may use it up for all."""
    greedy = {
        "sockets": "kept = []\ntry:\n    while True:\n        kept.append(socket.socketpair())\n"
        "        socket.send_fds(kept[0][0], [b'x'], [s.fileno() for s in kept[-1]])\nexcept OSError: pass",
        "pipes": "kept = []\ntry:\n    while True:\n        kept.append(os.pipe())\n        os.set_blocking(kept[-1][1], False)\n"
        "        os.write(kept[-1][1], bytes(1 << 16))\nexcept OSError: pass",
        "watches": "import select\nkept = []\ntry:\n    while True:\n        kept.append(select.epoll())\n"
        "        for fd in range(3): kept[-1].register(os.pipe()[0])\nexcept OSError: pass",
        "locks": "import fcntl\nkept = [open(f'/tmp/{n}', 'w') for n in range(100)]\n"
        "for n in range(50):\n    for file in kept: fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * n)",
        "threads": "try:\n    while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\nexcept RuntimeError: pass",
    }[disturb]
    limits = Limits(time_seconds=3, memory_mb=100, disk_mb=4)
    victim = open_jail(limits)
    assert victim.exec("x = 41").ok
    for _ in range(3):
        thief = open_jail(limits)
        assert thief.exec(TOOLS).ok
        thief.exec(greedy)
    assert victim.exec("import os\nos._exit(1)").state == "restored"
    assert victim.exec("x").value == "41"
    other = open_jail(limits)
    assert other.exec("import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()\n6 * 7").value == "42"
