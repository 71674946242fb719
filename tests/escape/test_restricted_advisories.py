"""Published ways out of the systems that `restricted` resembles, and what is known to remain.

The attacks are in ``restricted_attacks.py``. Each leaves what it reached in ``r``; the verdict looks at that object from the host, not at what the cell says. The
same attack in plain Python is the control: one that reaches nothing there proves nothing here. What is known to remain is
marked "not contained, by design", strictly: a hole that closes fails the run until this list and
``docs/limitations/restricted.md`` are corrected.
"""

from __future__ import annotations

import builtins
import collections
import collections.abc
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from rlm_sandbox import BackendUnavailable, Grade, Limits, Opaque, open_repl
from rlm_sandbox.registry import Availability, load_backend

from ..conftest import require_usable
from .restricted_attacks import ATTACKS, NO_PAYLOAD, Attack

CANARY: Final = "canary-3f9a71"
PAGE: Final = Path(__file__).parents[2] / "docs" / "limitations" / "restricted.md"

#: What a cell may never hold. Objects of these types, these functions, and a text with the canary or a host's path.
_FORBIDDEN_TYPES: Final = (
    types.ModuleType, types.FrameType, types.CodeType, types.TracebackType, types.CellType, types.MappingProxyType,
)  # fmt: skip
_FORBIDDEN: Final = (
    builtins.open,
    builtins.eval,
    builtins.exec,
    builtins.__import__,
    builtins.getattr,
    os.system,
    subprocess.Popen,
)


def leaked(value: Any, depth: int = 0) -> bool:
    """Whether ``value`` is, or leads at once to, something of the interpreter or the host."""
    if isinstance(value, _FORBIDDEN_TYPES) or any(value is item for item in _FORBIDDEN):
        return True
    if isinstance(value, str):
        return CANARY in value or "built-in method __subclasses__" in value or "'__builtins__'" in value
    if isinstance(value, types.BuiltinMethodType | types.MethodWrapperType) and value.__name__.startswith("__"):
        return True
    if depth < 2 and isinstance(value, dict):
        return "__builtins__" in value or "__import__" in value or any(leaked(item, depth + 1) for item in value.values())
    if depth < 2 and isinstance(value, list | tuple):
        return any(leaked(item, depth + 1) for item in value)
    return False


def llm_query(prompt: str) -> str:
    """A host function with globals worth having."""
    return prompt.upper()


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    try:
        state = load_backend("restricted").probe()
    except BackendUnavailable as exc:
        state = Availability(False, exc.reason, exc.remedy)
    require_usable("restricted", state)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The canary: in a file and in the environment."""
    path = tmp_path / "secret"
    path.write_text(CANARY)
    monkeypatch.setenv("RLM_CANARY", CANARY)
    return path


@pytest.fixture
def session(planted: Path) -> Iterator[Any]:
    with open_repl("restricted", limits=Limits(time_seconds=5), accept=Grade.NONE, trusted=True) as repl:
        repl.bind("llm_query", llm_query)
        repl.set("CANARY_FILE", str(planted))
        yield repl


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_published_way_out_is_closed(session: Any, attack: Attack) -> None:
    result = session.exec(attack.code)
    names = session._policy.names
    held = {name: value for name, value in names.items() if name != "__builtins__" and leaked(value)}
    assert not held, f"{result.outcome}: the cell holds {held}"
    assert "r" not in names or result.outcome == "ok"
    assert CANARY not in f"{result.stdout}{result.value}{result.error}{result.traceback}"
    assert session.exec("alive = 1").ok


@pytest.mark.parametrize(
    "attack", [item for item in ATTACKS.values() if item.control], ids=[k for k, v in ATTACKS.items() if v.control]
)
def test_the_attack_bites_in_plain_python(attack: Attack, planted: Path) -> None:
    names: dict[str, Any] = {
        "__name__": "victim",
        "llm_query": llm_query,
        "CANARY_FILE": str(planted),
        "__spec__": None,
        "__loader__": None,
    }
    exec(compile(attack.code, "<control>", "exec", dont_inherit=True), names)
    assert leaked(names["r"]) or isinstance(names["r"], type) or callable(names["r"])


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(3)",
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "raise BaseException('out')",
        "class E(BaseException):\n    pass\nraise E",
        "raise StopIteration",
        "def g():\n    yield 1\n    raise KeyboardInterrupt\nlist(g())",
        "class C:\n    def __repr__(self):\n        raise SystemExit\nC()",
        "class E(Exception):\n    def __str__(self):\n        raise KeyboardInterrupt\nraise E",
        "x = [SystemExit]\nraise x[0]",
    ],
)
def test_no_exception_leaves_the_session(session: Any, code: str) -> None:
    """asteval CVE-2026-55244: what is no Exception went past the interpreter, into the host."""
    result = session.exec(code)
    assert result.outcome == "error"
    assert session.exec("alive = 1").ok


# ---- what is shared with the host and other sessions stays as it is

POISONS: Final = {
    "a module (open-chat-studio 4238)": "import json\njson.loads = None",
    "a class": "import collections\ncollections.Counter.most_common = None",
    "a class by setattr": "import collections\nsetattr(collections.Counter, 'most_common', None)",
    "a class by del": "import collections\ndel collections.Counter.most_common",
    "a function": "import textwrap\ntextwrap.dedent.mine = 1",
    "a function by wraps": "import functools, textwrap\ndef f():\n    pass\nfunctools.wraps(f)(textwrap.dedent)",
    "an abstract class": "import typing\nclass C:\n    pass\ntyping.Iterable.register(C)",
    "the shared generator": "import random\nrandom.seed(1)",
    "the host's context": "ctx.find = None",
    "the host's metadata": "ctx.metadata()['files'].append('mine')",
    "its own builtins": "print.mine = 1\nlen.mine = 1",
    "the decimal context": "import decimal\ndecimal.getcontext().prec = 2",
    "the class of a proxy": "type(ctx).find = None",
}


@pytest.mark.parametrize("code", POISONS.values(), ids=POISONS)
def test_nothing_shared_is_changed(code: str) -> None:
    import decimal
    import random
    import textwrap

    from rlm_sandbox import Context

    context = Context.from_documents(["a needle"], metadata={"files": ["one.txt"]})
    before = (
        json.loads,
        collections.Counter.most_common,
        vars(textwrap.dedent).copy(),
        textwrap.dedent.__name__,
        random.getstate(),
    )
    with (
        open_repl("restricted", accept=Grade.NONE, trusted=True) as first,
        open_repl("restricted", accept=Grade.NONE, trusted=True) as second,
    ):
        for repl in (first, second):
            repl.bind("ctx", context)
        first.exec(code)
        after = (
            json.loads,
            collections.Counter.most_common,
            vars(textwrap.dedent).copy(),
            textwrap.dedent.__name__,
            random.getstate(),
        )
        assert after == before
        assert decimal.getcontext().prec == 28
        assert context.added_metadata == {"files": ["one.txt"]}
        assert second.exec(
            "import json, collections\nr = [json.loads('1'), collections.Counter('aab').most_common(1), ctx.find('needle')]"
        ).ok
        assert second.get("r") == [1, [("a", 2)], [(2, 8, "needle")]]


def test_a_value_that_comes_out_runs_nothing(session: Any) -> None:
    """smolagents CVE-2025-14931: results were unpickled on the host."""
    assert not session.exec("class E:\n    def __reduce__(self):\n        return (print, ('mine',))\ne = E()").ok
    assert session.exec("class E:\n    pass\ne = E()").ok
    assert isinstance(session.get("e"), Opaque)


# ---- known to remain


class Hole(NamedTuple):
    """``code`` runs in a process of its own, in a session with ``seconds`` and 64 MB, off the main thread if ``thread``."""

    code: str
    reason: str
    thread: bool = False
    seconds: float = 0.3


HOLES: Final = {
    "crash": Hole(
        "a = ()\nfor _ in range(2_000_000):\n    a = (a,)\nd = {a: 1}",
        "a deep structure overflows the C stack: the host dies of SIGSEGV",
        seconds=30.0,
    ),
    "memory": Hole(
        "x = ['y' * 1_000_000 + str(i) for i in range(200)]",
        "the total is not counted: many small pieces pass memory_mb",
        seconds=30.0,
    ),
    "memory-c": Hole("x = 'a'.ljust(200_000_000)", "one call in C makes as much as it likes", seconds=30.0),
    "c-iterator": Hole(
        "import itertools\nx = []\nx.extend(itertools.repeat(None, 40_000_000))",
        "what takes an iterator in C keeps all it gets: a list's extend, a dict's update",
        seconds=30.0,
    ),
    "addresses": Hole(
        "if '0x' not in repr(object()):\n    raise ValueError", "addresses of the host's memory are visible: id, repr", seconds=30.0
    ),
    "c-loop": Hole("1.5 in range(60_000_000)", "a loop in C looks at no clock"),
    "regex-thread": Hole(
        "import re\nre.match('(a|aa)+$', 'a' * 36 + 'c')",
        "off the main thread nothing interrupts a regular expression",
        thread=True,
    ),
    "freeze": Hole("1.5 in range(60_000_000)", "a call in C holds the interpreter's lock: every thread of the host stands still"),
}
_RUN: Final = """
import json, sys, threading, time
from rlm_sandbox import Grade, Limits, open_repl
code, in_thread, seconds = json.loads(sys.argv[1])
ticks = []
def beat():
    while True:
        ticks.append(time.monotonic())
        time.sleep(0.01)
threading.Thread(target=beat, daemon=True).start()
def main():
    with open_repl("restricted", limits=Limits(time_seconds=seconds, memory_mb=64), accept=Grade.NONE, trusted=True) as repl:
        result = repl.exec(code)
        gap = max((b - a for a, b in zip(ticks, ticks[1:] + [time.monotonic()])), default=0)
        print(json.dumps([result.outcome, result.usage.time_seconds, gap]), flush=True)
if in_thread:
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
else:
    main()
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.xfail(reason=f"not contained, by design: {hole.reason}", raises=AssertionError, strict=True)
        )
        for name, hole in HOLES.items()
    ],
)
def test_a_known_hole_is_contained(name: str) -> None:
    hole = HOLES[name]
    # The time it takes is bounded by the code itself, the memory by what the code asks for.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_RUN), json.dumps(hole[:1] + hole[2:])],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"the host died: {done.returncode}"
    outcome, seconds, gap = json.loads(done.stdout)
    assert outcome != "ok", "it ran to its end, beyond its limit"
    assert seconds < hole.seconds + 0.3, f"it ran for {seconds} s of {hole.seconds}"
    assert gap < 0.3, f"the host stood still for {gap} s"


def test_the_page_lists_every_hole() -> None:
    page = PAGE.read_text("utf-8")
    for name, hole in HOLES.items():
        assert f"| `{name}` | {hole.reason} |" in page
    assert page.count("| not contained, by design |") == 0
    listed = [
        line.split("`")[1]
        for line in page.partition("## Known holes")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    ]
    assert sorted(listed) == sorted(HOLES)


_ID: Final = r"CVE-\d+-\d+|GHSA(?:-\w{4}){3}|PVE-\d+-\d+|(?:PR|issue|grist-core|open-chat-studio) \d+"
#: Advisories whose tests are functions of their own, above.
_ELSEWHERE: Final = {("RestrictedPython", "open-chat-studio 4238"), ("asteval", "CVE-2026-55244")}


def test_the_page_lists_every_advisory_and_no_other() -> None:
    table = PAGE.read_text("utf-8").partition("## Published advisories")[2].partition("\n## ")[0]
    listed = re.findall(rf"^\| (\w+) \| ({_ID}) \| \S", table, re.MULTILINE)
    assert len(listed) == len(set(listed)) == len([line for line in table.splitlines() if line.startswith("| ")]) - 1
    tested = set(_ELSEWHERE)
    for key in ATTACKS:
        system, _, name = key.partition(": ")
        found = re.match(_ID, name)
        if found:
            tested.add((system, found[0]))
        else:
            assert system == "RLM" or name.startswith("an __import__"), key
    assert set(listed) == tested
    assert {advisory for _, advisory in listed} >= NO_PAYLOAD
