"""Cells that attack their session's recovery by replay: what the host saw before a kill decides what may be called restored."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from rlm_sandbox import Context, Limits, REPLProtocol, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from .wasm_host import FRAMES

KILL: Final = "import os\nos._exit(1)"

#: Each finds some number or text by means that differ from one run to the next on a machine, and tells it to the host.
SOURCES: Final = {
    "the clock": "import time\nx = [time.time_ns() for _ in range(50)]",
    "how fast it is": "import time\nn = 0\nend = time.monotonic() + 0.02\nwhile time.monotonic() < end:\n    n += 1\nx = n",
    "random numbers": "import os, random, secrets, uuid\nx = [os.urandom(8).hex(), random.random(), secrets.token_hex(), str(uuid.uuid4())]",
    "the raw seed": "import wit_world\nx = [wit_world.seed() for _ in range(3)]",
    "addresses": "x = [id(object()) for _ in range(20)] + [id([]), hash(object()), repr(lambda: 0)]",
    "the order of a set": "x = list({object(): 1, 'a': 2, 3: 4, (): 5}.values()) + list({str(i) for i in range(200)})",
    "the collector": "import gc\na = [[] for _ in range(5000)]\nx = [gc.get_count(), gc.get_stats()]",
    "how deep it gets": "n = 0\ndef f():\n    global n\n    n += 1\n    f()\ntry:\n    f()\nexcept RecursionError:\n    pass\nx = n",
    "how much fits into memory": "a = []\ntry:\n    while True:\n        a.append(bytes(1 << 20))\nexcept MemoryError:\n    x = len(a)\n    a = None",
    "answers that differ": "x = [f(0) for _ in range(5)]",
    "which answer comes first": (
        "import asyncio\norder = []\nasync def ask(n):\n    await slow(n)\n    order.append(n)\nawait asyncio.gather(*[ask(n) for n in range(6)])\nx = order"
    ),
    "a time-out of its own": (
        "import asyncio\nx = 0\ntry:\n    await asyncio.wait_for(slow(1000), 0.05)\nexcept TimeoutError:\n    import time\n    x = time.monotonic_ns()"
    ),
    "a call that fails": "try:\n    fail()\nexcept Exception as e:\n    x = [type(e).__name__, str(e)]",
    "a regular expression's search on the host": "x = ctx.find('n..dle', regex=True)",
    "the whole text": "x = [len(P), P[5:20], hash(P)]",
    "not a number": "import struct, math\nx = [struct.pack('<d', v).hex() for v in (math.inf - math.inf, float('nan'), -float('nan'), math.inf * 0)]",
    "a frame of its own": FRAMES + "x = wit_world.suspend(call(10**5, 99))\nmain._guest._session._calls._next = 10**6",
    "a generator left in the middle": "def g():\n    while True:\n        yield f(1)\nit = g()\nnext(it)\nx = [next(it), next(it)]",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _usable_wasm() -> None:
    require_usable("wasm", load_backend("wasm").probe())


@pytest.fixture
def told() -> list[Any]:
    """What the cells told the host."""
    return []


@pytest.fixture
def repl(told: list[Any]) -> Iterator[REPLProtocol]:
    numbers = itertools.count()
    with open_repl("wasm", limits=Limits(time_seconds=20, memory_mb=128)) as session:
        session.bind("tell", told.append)
        session.bind("f", lambda n: [n, next(numbers), time.monotonic_ns()])

        async def slow(n: int) -> int:
            import asyncio

            await asyncio.sleep((n * 7 % 5) * 0.01 if n < 100 else 30)
            return n

        def fail() -> None:
            raise RuntimeError("a secret")

        session.bind("slow", slow)
        session.bind("fail", fail)
        context = Context.from_text("hay " * 1000 + "needle" + " hay" * 1000)
        session.bind("ctx", context)
        session.bind("P", context.whole)
        yield session


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_restored_means_what_the_host_saw(repl: REPLProtocol, told: list[Any], source: str) -> None:
    """REC-501: the variable has the value the host was told, or the state is lost; and the host is not told again."""
    first = repl.exec(f"{source}\ntell(repr(x))")
    assert first.ok, first.error
    assert len(told) == 1
    for _ in range(2):  # also from what was itself restored
        result = repl.exec(KILL)
        assert (result.outcome, result.state) == ("crashed", "restored")
        assert repl.exec("tell(repr(x))").ok
    assert told == [told[0]] * 3


def test_a_killed_cell_undoes_what_it_did_to_its_recovery(repl: REPLProtocol, told: list[Any]) -> None:
    """REC-502: it may change all of the guest's own machinery, and dies with it."""
    assert repl.exec("x = [1]").ok
    vandal = (
        FRAMES
        + "x.append(2)\nimport gc\nfor o in gc.get_objects():\n    if type(o).__name__ in ('GuestSession', 'HostCalls', '_Transport'):\n"
        "        try:\n            vars(o).clear()\n        except TypeError:\n            pass\n"
        "main.load_string = main.dump_string = None\nwit_world.suspend = None\n"
    )
    assert repl.exec(vandal + KILL).state == "restored"
    assert repl.exec("tell(x)").ok
    assert told == [[1]]


def test_what_a_cell_breaks_for_good_stays_broken_after_a_replay(repl: REPLProtocol) -> None:
    """REC-503: a cell that succeeded is part of the state, whatever it did; a replay does not make it better or worse."""
    assert repl.exec("import builtins\nreal = builtins.repr\nbuiltins.repr = lambda value: 'forged'\nx = 1").ok
    before = [repl.exec("x").value, repl.exec("real(x)").value]
    assert repl.exec(KILL).state == "restored"
    assert [repl.exec("x").value, repl.exec("real(x)").value] == before


def test_a_killed_cells_calls_are_not_answered_from_the_journal(repl: REPLProtocol) -> None:
    """REC-504: the same cell after a recovery asks the host anew."""
    cell = "y = f(5)\n"
    assert repl.exec(cell + KILL).state == "restored"
    assert repl.exec(cell).ok
    assert repl.get("y")[:2] == [5, 1]


def test_a_cell_that_is_cheap_once_and_dear_in_a_replay_gains_nothing(repl: REPLProtocol) -> None:
    """REC-505: sleeping is not repeated, computing is bounded; either way the answer comes in time and is true."""
    assert repl.exec("import time\ntime.sleep(1.0)\nx = 1").ok
    for _ in range(3):
        assert repl.exec("n = 0\nfor i in range(400_000):\n    n += i").ok
    started = time.monotonic()
    result = repl.exec(KILL)
    assert time.monotonic() - started < 2.0 + 20.0  # the promise, and a loaded machine's share
    assert result.state in ("restored", "lost")
    if result.state == "restored":
        assert repl.get("n") == sum(range(400_000))
    else:
        assert {"x", "n", "i"} <= set(result.lost_names)


def test_an_interrupt_during_a_call_leaves_a_state_that_can_be_restored(repl: REPLProtocol, told: list[Any]) -> None:
    """REC-506: where the cell was when the host's caller interrupted it is in the journal, too."""
    release = threading.Event()
    repl.bind("wait", release.wait)
    timer = threading.Timer(0.3, repl.interrupt)
    timer.start()
    result = repl.exec("x = 'before'\ntry:\n    wait()\nexcept KeyboardInterrupt:\n    x = 'interrupted'")
    release.set()
    timer.join()
    assert (result.outcome, result.state) == ("interrupted", "kept")
    assert repl.exec("tell(x)").ok
    assert repl.exec(KILL).state == "restored"
    assert repl.exec("tell(x)").ok
    assert told == ["interrupted", "interrupted"]


def test_two_kills_in_a_row_and_a_kill_of_the_first_cell(repl: REPLProtocol) -> None:
    """REC-507: nothing is carried over from a killed guest to the next."""
    assert repl.exec("y = 1\n" + KILL).state == "restored"
    assert repl.exec("y = 1\n" + KILL).state == "restored"
    assert repl.names() == {}
    assert repl.exec("z = 1").ok
    assert repl.exec("z = 2\n" + KILL).state == "restored"
    assert repl.get("z") == 1
