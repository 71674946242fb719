"""Cells that mean harm to the process they run in: time, memory, the raw imports, frames of their own, other sessions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from rlm_sandbox import Limits, REPLProtocol, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from .outside import RESTORED, SURVIVED, Attack, Listener, wait_until
from .wasm_host import FRAMES, SMALL, HostMemory, Neighbour, assert_contained, guest_threads

OpenWasm = Callable[[Limits | None], REPLProtocol]

_ENDED: Final = ("limit",)
_DIED: Final = ("crashed",)
_BROKE: Final = ("violation",)
#: It says no more than that it was refused.
_REFUSED: Final = ("error", "limit", "crashed")
_ANY: Final = ("ok", "error", "limit", "crashed", "violation")


def _loop(body: str, imports: str = "import os, sys, time, select, asyncio, wit_world") -> str:
    return f"{imports}\nwhile True:\n    {body}"


ATTACKS: Final = (
    # ---- time: epochs are looked at by compiled code, so what leaves it for the host must be bounded there
    Attack("TIME-501", "run for ever", "while True: pass", _ENDED, RESTORED),
    Attack("TIME-502", "swallow what would end it", "while True:\n    try:\n        while True: pass\n    except BaseException: pass", _ENDED, RESTORED),
    Attack("TIME-503", "go on in finally", "try:\n    while True: pass\nfinally:\n    while True: pass", _ENDED, RESTORED),
    Attack("TIME-504", "sleep past the limit", "import time\ntime.sleep(3600)", _ENDED, RESTORED),
    Attack("TIME-505", "sleep in steps too short to be stopped in", _loop("time.sleep(0)"), _ENDED, RESTORED),
    Attack("TIME-506", "sleep for longer than a timer takes", "import time\ntime.sleep(9e9)", ("limit", "error"), SURVIVED),
    Attack("TIME-507", "burn time in one C call", "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')", _ENDED, RESTORED),
    Attack("TIME-508", "burn time in one instruction after another without a loop of Python", "max(__import__('itertools').count())", _ENDED, RESTORED),
    Attack("TIME-509", "burn time in a repr", "class A:\n    def __repr__(self):\n        while True: pass\nA()", _ENDED, RESTORED),
    Attack("TIME-510", "burn time in a destructor", "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a", _ENDED, RESTORED),
    Attack("TIME-511", "spend it all in the host: the clock", _loop("time.time()"), _ENDED, RESTORED),
    Attack("TIME-512", "spend it all in the host: random numbers", _loop("os.urandom(256)"), _ENDED, RESTORED),
    Attack("TIME-513", "spend it all in the host: output", _loop("print('x' * 100_000)"), _ENDED, RESTORED),
    Attack("TIME-514", "spend it all in the host: empty output", _loop("wit_world.write_out(1, False, '')"), _ENDED, RESTORED),
    Attack("TIME-515", "spend it all in the host: a text that is not there", _loop("wit_world.text_piece(0)"), _ENDED, RESTORED),
    Attack("TIME-516", "an event loop that never rests", "import asyncio\nasync def f():\n    while True:\n        await asyncio.sleep(0)\nawait f()", _ENDED, RESTORED),
    Attack("TIME-517", "copy memory without a loop", "a = bytearray(15 << 20)\nwhile True:\n    a[:] = bytes(15 << 20)", ("limit",), RESTORED),
    # ---- memory: of the instance, which the engine bounds, and of the host on its behalf
    Attack("MEM-501", "one huge text", "'x' * 10**9", ("limit",), SURVIVED),
    Attack("MEM-502", "more than 32 bits address", "'x' * 10**10", ("error",)),
    Attack("MEM-503", "a list that grows", "a = []\nwhile True:\n    a.append('x' * 100_000)", ("limit",), SURVIVED),
    Attack("MEM-504", "small objects", "a = []\nwhile True:\n    a.append([len(a)])", ("limit",), SURVIVED),
    Attack("MEM-505", "grow and shrink for ever", "while True:\n    try:\n        a = bytearray(1 << 20)\n        while True:\n            a = a + a\n    except MemoryError:\n        a = None", ("limit", "crashed"), RESTORED),
    Attack("MEM-506", "swallow the error and go on", "a = []\nwhile True:\n    try:\n        a.append(bytes(1 << 20))\n    except MemoryError:\n        pass", ("limit", "crashed"), SURVIVED),
    Attack("MEM-507", "a result of 40 MB", "'x' * (40 << 20)", ("ok", "limit", "crashed"), SURVIVED),
    Attack("MEM-508", "an error of 20 MB", "raise ValueError('x' * (20 << 20))", ("error", "limit", "crashed"), SURVIVED),
    Attack("MEM-509", "100,000 names", "globals().update({f'n{i}': i for i in range(100_000)})", ("ok", "limit"), SURVIVED),
    Attack("MEM-510", "a name of 5 MB", "globals()['x' * (5 << 20)] = 1", ("ok", "limit", "violation"), SURVIVED),
    Attack("MEM-511", "10**9 random bytes at once", "import os\nos.urandom(10**9)", ("limit", "error", "crashed"), SURVIVED),
    # ---- the stack: the guest's, and the host's below it
    Attack("STACK-501", "recursion without its limit", "import sys\nsys.setrecursionlimit(2**31 - 1)\ndef f(): f()\nf()", ("error", "crashed", "limit"), SURVIVED),
    Attack("STACK-502", "recursion through the host's clock", "import sys, time\nsys.setrecursionlimit(2**31 - 1)\ndef f():\n    time.time()\n    f()\nf()", ("error", "crashed", "limit"), SURVIVED),
    Attack("STACK-503", "recursion that prints", "import sys\nsys.setrecursionlimit(2**31 - 1)\ndef f():\n    print('x')\n    f()\nf()", ("error", "crashed", "limit"), SURVIVED),
    Attack("STACK-504", "nested source", "eval('(' * 5000 + ')' * 5000)", ("error", "limit", "crashed"), SURVIVED),
    Attack("STACK-505", "nested data", "import json\njson.loads('[' * 200_000)", ("error", "crashed", "limit"), SURVIVED),
    # ---- files, network, environment, processes: there is nothing to reach
    Attack("FS-501", "open files", "import os\nfor p in ('/', '/etc/passwd', '/proc/self/environ', '.', '..', '/tmp', '//', 'C:\\\\'):\n    for f in (open, os.listdir, os.stat, os.scandir, os.mkdir, os.rmdir, os.chdir, os.readlink):\n        try:\n            f(p)\n        except (OSError, ValueError):\n            continue\n        raise SystemExit(f'{f} {p}')"),
    Attack("FS-502", "use descriptors that are not there", "import os\nfound = []\nfor fd in range(3, 2000):\n    try:\n        os.fstat(fd)\n        found.append(fd)\n    except OSError:\n        pass\nassert not found"),
    Attack("ENV-501", "read the environment, the arguments, the host's name", "import os, sys, platform\nassert not dict(os.environ) and not any(sys.argv) and platform.node() == '(none)' and os.getpid() == 42"),
    Attack("PROC-501", "start a process", "import os, subprocess\nfor f in (lambda: subprocess.run(['true']), lambda: os.system('true'), lambda: os.fork(), lambda: os.execv('/bin/true', ['true']), lambda: os.posix_spawn('/bin/true', [], {})):\n    try:\n        f()\n    except (OSError, AttributeError, NotImplementedError):\n        continue\n    raise SystemExit('started')"),
    Attack("PROC-502", "end the process", "import os\nos._exit(0)", _DIED, RESTORED),
    Attack("PROC-503", "abort", "import os\nos.abort()", ("crashed", "error"), SURVIVED),
    Attack("PROC-504", "signal the host", "import os, signal\nfor n in (2, 9, 15):\n    try:\n        os.kill(1, n)\n    except OSError:\n        pass\nsignal.raise_signal(2)", ("ok", "error", "crashed", "interrupted"), SURVIVED),
    Attack("PROC-505", "trap in the interpreter", "import faulthandler\nfaulthandler._sigsegv()", ("crashed", "error", "ok"), SURVIVED),
    Attack("PROC-506", "corrupt the interpreter with bytecode of its own", "def f(): pass\nf.__code__ = f.__code__.replace(co_code=bytes([100, 255] * 64), co_stacksize=1)\nf()", _ANY, SURVIVED),
    Attack("PROC-507", "corrupt it with unchecked unmarshalling", "import marshal, random\nrandom.seed(5)\nfor _ in range(3000):\n    try:\n        marshal.loads(bytes(random.randrange(256) for _ in range(40)))\n    except (ValueError, EOFError, TypeError, MemoryError, OverflowError):\n        pass", _ANY, SURVIVED),
    # ---- the imports, with arguments of the attacker's choice
    Attack("ABI-501", "more than the engine lets through at once", "import wit_world\nwit_world.suspend('x' * (140 << 20))", _REFUSED, SURVIVED),
    Attack("ABI-502", "as much as fits, to descriptors that are not there", "import wit_world\nfor n in (0, 3, 2**32 - 1):\n    wit_world.write_out(n, True, 'x' * (20 << 20))", ("ok", "limit", "crashed"), SURVIVED),
    Attack("ABI-503", "a text's piece from beyond its end", "import wit_world\nassert wit_world.text_piece(2**64 - 1) == ''"),
    Attack("ABI-504", "arguments of the wrong type", "import wit_world\nfor f, a in ((wit_world.suspend, (5,)), (wit_world.write_out, ('1', 2, None)), (wit_world.text_piece, (-1,)), (wit_world.suspend, ('\\ud800',))):\n    try:\n        f(*a)\n    except Exception:\n        pass", _ANY, SURVIVED),
    Attack("ABI-505", "re-enter the guest from the guest", "m = main\nm._guest.request(frame(['exec', 0, 'y = 666', [], 0]))", _ANY, SURVIVED, tools=True),
    # ---- frames of its own: the turn is decided by which import was called, not by what the frame says
    Attack("PROTO-501", "say that the turn is over, and go on", "wit_world.suspend(DONE)\nwhile True: pass", _BROKE, RESTORED, tools=True),
    Attack("PROTO-502", "say that the turn is over, and return later", "wit_world.suspend(DONE)", _BROKE, RESTORED, tools=True),
    Attack("PROTO-503", "return a suspension as the end of the turn", "class T:\n    ended = call(1, 0)\n    max_chars = 10**9\n    def send(self, m, a): pass\nmain._guest._transport = T()", _BROKE, RESTORED, tools=True),
    Attack("PROTO-504", "return nothing", "class T:\n    ended = ''\n    def send(self, m, a): pass\nmain._guest._transport = T()", _BROKE, RESTORED, tools=True),
    Attack("PROTO-505", "return what is no text", "class T:\n    ended = 5\n    def send(self, m, a): pass\nmain._guest._transport = T()", _DIED, RESTORED, tools=True),
    Attack("PROTO-506", "a table of lengths that lie", "wit_world.suspend('999999999999 t999999999999\\n[]')", _BROKE, RESTORED, tools=True),
    Attack("PROTO-507", "a header too deep to parse", "wit_world.suspend(f'{200_000}\\n' + '[' * 200_000)", _BROKE, RESTORED, tools=True),
    Attack("PROTO-508", "a header of numbers no host should compute", "h = '[\"suspend\",[[' + '9' * 100_000 + ',0,null,[],[]]],false]'\nwit_world.suspend(f'{len(h)}\\n{h}')", _BROKE, RESTORED, tools=True),
    Attack("PROTO-509", "not a number", "wit_world.suspend(frame(['suspend', [[float('nan'), float('inf'), None, None, None]], False]))", _BROKE, RESTORED, tools=True),
    Attack("PROTO-510", "the same call twice", "wit_world.suspend(call(10**6, 0))\nwit_world.suspend(call(10**6, 0))", _BROKE, RESTORED, tools=True),
    Attack("PROTO-511", "handles that were never given", "for n in (0, 1, 7, -1, 2**62):\n    wit_world.suspend(call(10**6 + abs(n), n))", ("ok", "violation"), SURVIVED, tools=True),
    Attack("PROTO-512", "wait for no call, for ever", "wit_world.suspend(frame(['suspend', [], True]))", _BROKE, RESTORED, tools=True),
    Attack("PROTO-513", "a message that only the host sends", "wit_world.suspend(frame(['exec', 0, '1', [], 0]))", _BROKE, RESTORED, tools=True),
    Attack("PROTO-514", "names that are no names, and a failure that lies about the kind", "class T:\n    ended = frame(['done', None, None, ['LimitExceeded', 'time', ''], True, ['\\x1b[2J', '']])\n    max_chars = 10**9\n    def __init__(self, real): self.real = real\n    def send(self, m, a): pass\n    def exchange(self, m, a): return self.real.exchange(m, a)\nreal = main._guest._transport\nmain._guest._transport = T(real)\nimport atexit", ("error", "violation"), SURVIVED, after=SURVIVED, tools=True),
    # ---- what it leaves behind
    Attack("POISON-501", "break the modules of every later cell", "import builtins, json, sys\nbuiltins.len = json.loads = None\nsys.modules.clear()\nsys.meta_path.clear()\nbuiltins.__import__ = None", ("ok", "error", "crashed"), SURVIVED),
)  # fmt: skip
#: They forge every later answer of their own session: a guest's own words. Their next cell is not looked at here.
_FORGES_ITS_SESSION: Final = ("PROTO-514",)


def declared_mb(repl: REPLProtocol) -> int:
    """What the backend says that one session can cost the host."""
    worst = repl.capabilities.host_memory_worst_mb
    assert worst is not None
    return worst


@pytest.fixture(scope="module", autouse=True)
def _usable_wasm() -> None:
    require_usable("wasm", load_backend("wasm").probe())


@pytest.fixture
def open_wasm() -> Iterator[OpenWasm]:
    """Open sessions, by default with small limits."""
    opened: list[REPLProtocol] = []

    def open_one(limits: Limits | None = None) -> REPLProtocol:
        repl = open_repl("wasm", limits=limits or SMALL)
        opened.append(repl)
        return repl

    yield open_one
    for repl in opened:
        repl.close()


@pytest.fixture
def neighbour(open_wasm: OpenWasm, tmp_path: Path) -> Iterator[Neighbour]:
    """Another session of the process."""
    found = Neighbour(open_wasm(Limits(time_seconds=10)), tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_contained(open_wasm: OpenWasm, neighbour: Neighbour, attack: Attack) -> None:
    repl = open_wasm(None)
    if attack.id in _FORGES_ITS_SESSION:
        assert repl.exec(FRAMES).ok
        assert repl.exec(attack.code).outcome in attack.outcomes
        neighbour.assert_untouched()
        return
    with HostMemory() as memory:
        assert_contained(repl, attack, neighbour)
    assert memory.grown_mb < declared_mb(repl)


def test_ids_are_unique() -> None:
    assert len({attack.id for attack in ATTACKS}) == len(ATTACKS)


def test_nothing_is_reached_by_network(open_wasm: OpenWasm, listener: Listener) -> None:
    """NET-501: by the library, and by the raw module below it."""
    repl = open_wasm(None)
    for code in (
        f"import socket\nsocket.create_connection(('127.0.0.1', {listener.port}))",
        f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{listener.port}')",
        f"import _socket\ns = _socket.socket(2, 1)\ns.connect(('127.0.0.1', {listener.port}))",
        "import _socket\n_socket.getaddrinfo('localhost', 80)",
    ):
        assert repl.exec(code).outcome in ("error", "crashed")


def test_calls_without_end_are_bounded(open_wasm: OpenWasm) -> None:
    """BR-501: the host's function runs as often as was allowed, and not once more."""
    calls: list[int] = []
    repl = open_wasm(Limits(time_seconds=20, host_calls=50))
    repl.bind("f", calls.append)
    result = repl.exec("while True:\n    try:\n        f(1)\n    except BaseException:\n        pass")
    assert (result.outcome, result.limit and result.limit.kind) == ("limit", "host_calls")
    assert len(calls) == 50
    assert repl.exec("1 + 1").value == "2"


def test_answers_without_end_do_not_fill_the_host(open_wasm: OpenWasm) -> None:
    """MEM-521: each answer is kept for a replay; together they must not be more than was set aside for that."""
    repl = open_wasm(Limits(time_seconds=20, host_calls=None))
    piece = "x" * (4 << 20)
    repl.bind("f", lambda: piece + "y", inline=True)
    with HostMemory() as memory:
        assert repl.exec("for _ in range(100):\n    f()").ok
    assert memory.grown_mb < 64 + 128  # the journal's share, and some on their way
    assert not repl.exec("1").protected


#: A frame as large as the guest's memory lets it be built: four bytes a character there, and again on the host.
_LARGEST_FRAME: Final = """
head = json.dumps(['suspend', [[10**6, 0, None, ['l', ['a', 0]], ['d']]], False])
table = f"{len(head)} t{n}\\n"
wit_world.suspend((table + head + chr(0x1f600)).ljust(len(table) + len(head) + n, 'x'))
"""


@pytest.mark.parametrize("heap", [0.0, 0.5, 1.0])
def test_the_host_never_needs_more_than_is_declared(open_wasm: OpenWasm, heap: float) -> None:
    """MEM-522: a heap that stays, a second guest that follows it, a frame of what is left, a kill, and the recovery."""
    repl = open_wasm(Limits(time_seconds=30, memory_mb=256))
    free = (256 - 40) << 20
    with HostMemory() as memory:
        assert repl.exec(FRAMES).ok
        for n in range(12):
            assert repl.exec(f"v{n} = {n}").ok
        assert repl.exec(f"kept = [bytes(1 << 20) for _ in range({int(free * heap) >> 20})]").ok
        if heap < 1:
            assert repl.exec(f"n = {int(free * (1 - heap) / 9.5)}\n{_LARGEST_FRAME}").ok
        wait_until(lambda: repl.exec("1").protected, "the session was never followed", 30)
        assert repl.exec("import os\nos._exit(1)").state == "restored"
        assert repl.exec("1").ok
    assert memory.grown_mb < declared_mb(repl)


def test_dead_guests_give_their_memory_back(open_wasm: OpenWasm) -> None:
    """MEM-523: at once, and not when the host's collector happens to run: ten of them would be more than a gigabyte."""
    repl = open_wasm(Limits(time_seconds=30, memory_mb=160))
    gc.disable()
    try:
        with HostMemory() as memory:
            for _ in range(10):
                result = repl.exec("a = [bytes(1 << 20) for _ in range(110)]\nimport os\nos._exit(1)")
                assert (result.outcome, result.state) == ("crashed", "restored")
    finally:
        gc.enable()
    assert memory.grown_mb < declared_mb(repl)


def test_the_deadline_holds_in_every_session_at_once(open_wasm: OpenWasm) -> None:
    """TIME-521: many guests that compute for ever do not keep each other's deadlines from coming."""
    import threading

    outcomes: list[str] = []
    sessions = [open_wasm(Limits(time_seconds=0.5)) for _ in range(8)]
    threads = [threading.Thread(target=lambda s=s: outcomes.append(s.exec("while True: pass").outcome)) for s in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outcomes == ["limit"] * 8


_SMALL_STACKS: Final = """
import threading
from rlm_sandbox import open_repl
from rlm_sandbox.errors import BackendUnavailable

start, times = threading.Thread.start, TIMES

def interfere(thread):
    global times
    times -= thread.name.startswith("rlm-sandbox-wasm-cell")
    if times >= 0:
        threading.stack_size(256 * 1024)
    start(thread)

threading.Thread.start = interfere
try:
    with open_repl("wasm") as session:
        print(session.exec("import json\\njson.loads('[' * 200000)").error.partition(":")[0])
except BackendUnavailable as exc:
    print(exc)
"""


@pytest.mark.parametrize(
    ("times", "said"), [("1", "RecursionError"), ("1000000", "have no other thread call threading.stack_size()")]
)
def test_a_thread_with_a_small_stack_runs_no_guest(open_wasm: OpenWasm, times: str, said: str) -> None:
    """HOST-521: the size of stacks is the process's, so another thread of the program can make ours small; recursion would end it all."""
    import subprocess
    import sys

    source = _SMALL_STACKS.replace("TIMES", times)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout


def test_a_guest_that_is_still_running_is_not_entered_again(open_wasm: OpenWasm) -> None:
    """PROTO-521: what the session believes of a turn does not matter: the engine is for one thread at a time."""
    from rlm_sandbox.backends.wasm.instance import Instance
    from rlm_sandbox.backends.wasm.journal import Entry
    from rlm_sandbox.backends.wasm.peer import LivePeer
    from rlm_sandbox.backends.wasm.session import WasmSession

    repl = open_wasm(Limits(time_seconds=20))
    assert isinstance(repl, WasmSession)
    instance: Instance = repl._instance
    ended: list[str | None] = []

    def enter_again() -> None:
        peer = LivePeer(Entry(""))
        instance.start("1\n1", peer)
        peer.signals.get(timeout=10)
        ended.append(peer.failed)

    repl.bind("enter_again", enter_again)
    assert repl.exec("enter_again()\n6 * 7").value == "42"
    assert ended == ["it was still running its last request"]
    wait_until(lambda: guest_threads() == 0, "a guest runs on")  # the pool makes ready ones, too


def test_what_one_session_does_to_its_interpreter_no_other_sees(open_wasm: OpenWasm) -> None:
    """POISON-521: ready instances were made before, later ones after; each is pristine."""
    attacker = open_wasm(None)
    spoil = (
        "import builtins, sys, json, wit_world, random\nsys.poisoned = builtins.poisoned = json.poisoned = wit_world.poisoned = 1\n"
        "random.seed(1)\nsys.setrecursionlimit(77)\nsys.modules['antigravity'] = json"
    )
    assert attacker.exec(spoil).ok
    look = (
        "import builtins, sys, json, wit_world\n[hasattr(m, 'poisoned') for m in (sys, builtins, json, wit_world)], "
        "sys.getrecursionlimit() == 77, 'antigravity' in sys.modules"
    )
    for _ in range(4):
        assert open_wasm(None).exec(look).value == "([False, False, False, False], False, False)"


def test_the_guests_image_holds_nothing_of_the_machine_that_built_it() -> None:
    """ENV-521: no path, name or variable of the host is in the bytes every session starts from."""
    import os
    import socket

    from rlm_sandbox.backends.wasm.component import existing_component

    component = existing_component(None)
    assert component is not None
    here = {str(Path(__file__).parents[2]), str(Path.home() / "."), socket.gethostname(), "rlm-sandbox-build-"}
    here |= {value for key, value in os.environ.items() if len(value) > 12 and "/" not in value}
    for text in here:
        assert len(text) < 6 or text.encode() not in component.data, text
