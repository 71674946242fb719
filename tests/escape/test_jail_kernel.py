"""What the kernel is asked for: every system call, memory that no limit counts, and what can be learnt of the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from rlm_sandbox import Limits, REPLProtocol
from rlm_sandbox.confine import seccomp

from .conftest import OpenJail
from .outside import TOOLS, Attack, SessionProcesses, assert_contained

# ---- system calls

#: The kernel's own tracing calls pass every filter since Linux 6.14, and kill whoever makes them.
_OF_THE_KERNEL: Final = {335, 336}


def test_every_system_call_that_is_not_in_the_table_is_refused(repl: REPLProtocol, processes: SessionProcesses) -> None:
    named = {seccomp.NUMBERS[name] for name in seccomp.WORKER} - {seccomp.NUMBERS[name] for name in seccomp.LAST}
    numbers = [*sorted(set(range(471)) - named - _OF_THE_KERNEL), 512, 520, 547, 1000]
    code = (
        f"passed = []\nfor number in {numbers}:\n"
        "    for value in (-1, 0):\n"
        "        ctypes.set_errno(0)\n"
        "        if libc.syscall(number, *[ctypes.c_long(value)] * 6) != -1 or ctypes.get_errno() != 1: passed.append(number)\n"
        "passed"
    )
    assert repl.exec(TOOLS).ok
    result = assert_contained(repl, Attack("KERN-001", "a system call that was forgotten", code), processes)
    assert result.value == "[]"


_REFUSED: Final = {
    "a process by clone3": (435, 0, 0),
    "a namespace by clone": (56, 0x10000011, 0, 0, 0, 0),
    "a sibling by CLONE_PARENT": (56, 0x8011, 0, 0, 0, 0),
    "memory shared with a child": (56, 0x4111, 0, 0, 0, 0),
    "anonymous shared memory": (9, 0, 1 << 20, 3, 0x21, -1, 0),
    "memory that grows down": (9, 0, 1 << 20, 3, 0x122, -1, 0),
    "huge pages": (9, 0, 1 << 21, 3, 0x40022, -1, 0),
    "advice to leave memory out of a fork": (28, 0, 4096, 10),
    "advice to wipe memory in a fork": (28, 0, 4096, 18),
    "one's own limits": (302, 0, 0, b"\xff" * 16, 0),
    "the supervisor's limits": (302, 1, 0, 0, 0),
    "pdeathsig": (157, 1, 9, 0, 0, 0),
    "to be dumpable": (157, 4, 1, 0, 0, 0),
    "to reap for others": (157, 36, 1, 0, 0, 0),
    "seccomp": (317, 1, 0, 0),
    "a datagram pair": (53, 1, 2, 0, b"\0" * 8),
    "an inet pair": (53, 2, 1, 0, b"\0" * 8),
    "a terminal's input": (16, 0, 0x5412, b"x"),
    "an owner for signals, by ioctl": (16, 1, 0x8901, b"\1\0\0\0"),
    "a bigger pipe": (72, 1, 1031, 1 << 20),
    "a lease": (72, 1, 1024, 0),
    "a handle to the host process": (55, 3, 1, 77, b"\0" * 4, b"\4\0\0\0"),
    "bigger socket buffers": (54, 3, 1, 7, b"\xff\xff\xff\x7f", 4),
    "descriptors to others": (46, 3, b"\0" * 56, 0),
    "the mode of a descriptor's file": (91, 0, 0),
}


@pytest.mark.parametrize("call", _REFUSED.values(), ids=_REFUSED)
def test_a_dangerous_argument_is_refused(repl: REPLProtocol, call: tuple[Any, ...]) -> None:
    assert repl.exec(TOOLS).ok
    number, *arguments = call
    made = ", ".join(repr(value) if isinstance(value, bytes) else f"ctypes.c_long({value})" for value in arguments)
    result = repl.exec(f"ctypes.set_errno(0)\nresult = libc.syscall({number}, {made})\n(result, ctypes.get_errno())")
    assert result.value in ("(-1, 1)", "(-1, 38)")


@pytest.mark.parametrize(
    "code",
    [
        "libc.syscall(0x40000000 + 39)",
        (
            "area = mmap.mmap(-1, 4096, prot=7, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\narea.write(bytes.fromhex('b814000000cd80c3'))\n"
            "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))()"
        ),
    ],
    ids=["x32", "int 0x80"],
)
def test_a_call_by_another_architecture_kills(repl: REPLProtocol, code: str) -> None:
    assert repl.exec(TOOLS + "x = 41").ok
    result = repl.exec(code)
    assert (result.outcome, result.state) == ("crashed", "restored")
    assert result.error is not None
    assert "SIGSYS" in result.error
    assert repl.exec("x").value == "41"


# ---- memory that is not in the limit

_MEMORY_MB: Final = 100
_HOLES: Final = {
    "/dev/zero, shared": "fd = os.open('/dev/zero', os.O_RDWR)\narea = mmap.mmap(fd, 400 << 20, mmap.MAP_SHARED)\n"
    "for at in range(0, len(area), 4096): area[at] = 1",
    "the stack, moved and enlarged": """
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
nested = []
for _ in range(900): nested = [nested]
repr(nested)  # grows the stack, so that its lowest page is not in use
reader, writer = os.pipe()
def mapped(address): return libc.write(writer, ctypes.c_void_p(address), 1) == 1 and os.read(reader, 1)
low = ctypes.c_void_p.in_dll(libc, '__environ').value & ~4095
while mapped(low - 4096): low -= 4096
area = libc.mremap(low, 4096, 400 << 20, 1)
if area != 2**64 - 1: ctypes.memset(area, 1, 400 << 20)
""",
    "a file in /tmp, shared": "fd = os.open('/tmp/f', os.O_RDWR | os.O_CREAT)\nos.ftruncate(fd, 16 << 20)\n"
    "areas = [mmap.mmap(fd, 16 << 20) for _ in range(20)]\nfor area in areas: area[:] = b'x' * len(area)",
    "private and writable later": "libc.mmap.restype = ctypes.c_void_p\n"
    "area = libc.mmap(None, ctypes.c_size_t(400 << 20), 1, 0x22, -1, 0)\n"
    "if libc.mprotect(ctypes.c_void_p(area), ctypes.c_size_t(400 << 20), 3) == 0: ctypes.memset(area, 1, 400 << 20)",
    "a copy of a library": "fd = os.open('/usr/bin/python3', os.O_RDONLY)\nareas = []\n"
    "for _ in range(1000):\n    areas.append(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))\n    areas[-1][:] = b'x' * len(areas[-1])",
    "the heap": "libc.sbrk.restype = ctypes.c_void_p\nlibc.sbrk.argtypes = (ctypes.c_long,)\n"
    "area = libc.sbrk(400 << 20)\nif area != 2**64 - 1: ctypes.memset(area, 1, 400 << 20)",
    "stacks of threads": "threading.stack_size(400 << 20)\nthreading.Thread(target=lambda: ctypes.memset(ctypes.create_string_buffer(300 << 20), 1, 300 << 20)).start()",
}  # fmt: skip


@pytest.mark.parametrize("code", _HOLES.values(), ids=_HOLES)
def test_no_memory_beyond_the_limit(open_jail: OpenJail, processes: SessionProcesses, code: str) -> None:
    repl = open_jail(Limits(time_seconds=5, memory_mb=_MEMORY_MB, disk_mb=16))
    assert repl.exec(TOOLS).ok
    result = repl.exec(code)
    # Shared pages of /tmp count once for the session and again in each process's resident set.
    assert processes.resident_mb() < _MEMORY_MB + 16 * 20 * ("/tmp" in code) + 60
    assert result.outcome in ("ok", "error", "limit")
    assert repl.exec("1 + 1").value == "2"


_COUNT_SHARED: Final = "Shmem:"


def test_shared_memory_is_bounded_by_the_disk(open_jail: OpenJail) -> None:
    def shared_mb() -> float:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(_COUNT_SHARED))

    repl = open_jail(Limits(time_seconds=5, memory_mb=_MEMORY_MB, disk_mb=16))
    assert repl.exec(TOOLS).ok
    before = shared_mb()
    repl.exec(
        "files = []\ntry:\n    while True:\n        files.append(os.open('/tmp', os.O_RDWR | os.O_TMPFILE))\n"
        "        os.write(files[-1], b'x' * 1_000_000)\nexcept OSError: pass"
    )
    assert shared_mb() - before < 16 + 24  # other programs use shared memory, too


# ---- what can be learnt

_HOST: Final = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
from rlm_sandbox import Context, Limits, open_repl
with open_repl("jail", limits=Limits(time_seconds=30)) as repl:
    repl.bind("ctx", Context.from_text("text " * 100))
    def broken(): raise ValueError(os.environ["SECRET"] + __file__)
    repl.bind("broken", broken)
    result = repl.exec(open(sys.argv[2]).read())
    print(json.dumps([result.outcome, result.error, result.stdout, result.traceback]))
"""
_SCAN: Final = """
import ctypes, os, re
libc = ctypes.CDLL(None, use_errno=True)
try: broken()
except Exception as exc: print(exc)
own = bytes(reversed(b'nekot' + b'-ym' * 4)) * 2
pattern = re.compile(b'YRANAC'[::-1] + b'[-A-Z0-9]{4,40}|' + own)
reader, writer = os.pipe()
def mapped(address):
    return libc.write(writer, ctypes.c_void_p(address), 1) == 1 and bool(os.read(reader, 1))
seeds = [id(object()), id(re), id('x' * 10**6), ctypes.cast(libc.write, ctypes.c_void_p).value,
         ctypes.c_void_p.in_dll(libc, '__environ').value, ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value]
pages, found, planted = set(), set(), False
for seed in seeds:
    for step in (4096, -4096):
        address, gap = seed & ~4095, 0
        while gap < 600 and len(pages) < 40_000:
            if address not in pages:
                if mapped(address):
                    pages.add(address)
                    gap = 0
                    for hit in pattern.findall(ctypes.string_at(address, 4096)):
                        if hit == own: planted = True
                        else: found.add(hit)
                else:
                    gap += 1
            address += step
print('PAGES', len(pages), 'PLANTED', planted, 'FOUND', found)
for top, _, files in os.walk('/'):
    for name in files:
        if top.startswith('/dev'): continue
        try:
            with open(os.path.join(top, name), 'rb') as file:
                if pattern.search(file.read(1 << 20)): print('FILE', name)
        except OSError: pass
print(os.uname(), dict(os.environ), os.getcwd(), os.listdir('/'), __import__('sys').orig_argv)
"""


def test_nothing_of_the_host_is_in_a_guests_memory(processes: SessionProcesses, tmp_path: Path) -> None:
    """Environment, arguments, working directory, script path, error texts: searched for in all the memory a guest can find."""
    canary = "CANARY-" + os.urandom(6).hex().upper()
    place = tmp_path / canary
    place.mkdir()
    (place / "host.py").write_text(_HOST)
    (place / "scan.py").write_text(_SCAN)
    project = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, str(place / "host.py"), project, str(place / "scan.py"), canary],
        cwd=place,
        env={**os.environ, "SECRET": canary, canary: "x", "HOME": str(place), "PYTHONPYCACHEPREFIX": str(place)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    outcome, error, said, _ = json.loads(run.stdout)
    assert outcome == "ok", error
    assert "PLANTED True" in said, "the search finds nothing at all, so it shows nothing"
    assert "FOUND set()" in said
    assert "FILE" not in said
    assert canary not in run.stdout
    assert os.uname().nodename not in said or os.uname().nodename in ("sandbox", "localhost")
