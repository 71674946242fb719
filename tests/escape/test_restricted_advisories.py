"""Published ways out of the systems that `restricted` resembles, and what is known to remain.

The attacks are written after short descriptions of the advisories they are named for; they are not the original exploits, and
an advisory may have had more to it. Not here: what concerns a host application or Pyodide alone (grist 2353, CVE-2025-68668).

Each attack leaves what it reached in ``r``; the verdict looks at that object from the host, not at what the cell says. The
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


class Attack(NamedTuple):
    """``control``: it reaches something in plain Python too (not so where the hole was in a system of its own making)."""

    code: str
    control: bool = True


F: Final = "def f():\n    return 1\n"

RESTRICTED_PYTHON: Final = {
    "CVE-2023-37271 generator": Attack("def gen():\n    yield g.gi_frame\ng = gen()\nr = next(g)"),
    "CVE-2023-37271 back": Attack("g = (g.gi_frame.f_back for _ in [1])\nr = [g.gi_frame]"),
    "CVE-2023-37271 getattr": Attack("def gen():\n    yield 1\nr = getattr(gen(), 'gi_frame')"),
    "CVE-2023-37271 code": Attack("def gen():\n    yield 1\nr = gen().gi_code"),
    "CVE-2023-41039 format": Attack(f"{F}r = '{{0.__globals__}}'.format(f)"),
    "CVE-2023-41039 format_map": Attack(f"{F}r = '{{x.__globals__}}'.format_map({{'x': f}})"),
    "CVE-2023-41039 class": Attack(f"{F}r = str.format('{{0.__globals__}}', f)"),
    "CVE-2023-41039 getattr": Attack(f"{F}r = getattr('{{0.__globals__}}', 'format')(f)"),
    "CVE-2023-41039 map": Attack(f"{F}r = list(map(str.format, ['{{0.__globals__}}'], [f]))"),
    "CVE-2023-41039 subclass": Attack(f"{F}class S(str):\n    pass\nr = S('{{0.__globals__}}').format(f)"),
    "CVE-2024-47532 obj": Attack("import string\ntry:\n    string.nothing\nexcept AttributeError as e:\n    r = e.obj"),
    "CVE-2024-47532 name": Attack("import math\ntry:\n    math.nothing\nexcept AttributeError as e:\n    r = getattr(e, 'obj')"),
    "CVE-2025-22153 except*": Attack("try:\n    raise ValueError\nexcept* ValueError as e:\n    r = e.__class__.__base__.__subclasses__"),
    "CVE-2026-55830 positional": Attack("def g():\n    pass\ndef f(_getattr_, /):\n    return g.__globals__\nr = f(lambda o, n: o)"),
    "CVE-2026-55830 lambda": Attack("def g():\n    pass\nr = (lambda _write_, /: g.__globals__)(0)"),
    "CVE-2026-55830 hook names": Attack(f"{F}def g(_getattr_, _getitem_, _write_, getattr, /):\n    return f.__globals__\nr = g(1, 2, 3, 4)"),
    "CVE-2026-76825 Formatter": Attack(f"{F}import string\nr = string.Formatter().format('{{0.__globals__}}', f)"),
    "PR 330 attrgetter": Attack(f"{F}import operator\nr = operator.attrgetter('__globals__')(f)"),
    "PR 330 dotted": Attack("import operator\nr = operator.attrgetter('__class__.__base__.__subclasses__')('a')"),
    "PR 330 methodcaller": Attack("import operator\nr = operator.methodcaller('__dir__')(1) and operator.methodcaller('__subclasses__')(object)"),
    "an __import__ of the host": Attack("r = __import__('os')"),
    "an __import__ by getattr": Attack("import builtins\nr = getattr(builtins, '__import__')"),
}  # fmt: skip
SMOLAGENTS: Final = {
    "CVE-2025-5120 getattr": Attack(f"{F}r = getattr(f, '__globals__')"),
    "CVE-2025-5120 random": Attack("import random\nr = random._os"),
    "CVE-2025-5120 json": Attack("import json\nr = json.codecs"),
    "CVE-2025-5120 re": Attack("import re\nr = re.enum.sys"),
    "CVE-2025-5120 statistics": Attack("import statistics\nr = statistics.math"),
    "CVE-2025-5120 dataclasses": Attack("import dataclasses\nr = dataclasses.sys.modules"),
    "CVE-2025-5120 from": Attack("from json import codecs\nr = codecs"),
    "CVE-2025-5120 collections": Attack("from collections import _sys as r"),
    "CVE-2025-5120 queue": Attack("import queue\nr = queue.threading"),
    "CVE-2025-9959 walk": Attack("r = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen']"),
    "CVE-2025-9959 subclasses": Attack("r = object.__subclasses__"),
    "CVE-2025-9959 type": Attack("r = type(1).__base__.__subclasses__"),
    "CVE-2026-4963 str subclass": Attack(
        f"{F}class S(str):\n    def startswith(self, *a):\n        return False\nr = getattr(f, S('__globals__'))"
    ),
    "CVE-2026-4963 default": Attack(
        f"{F}class S(str):\n    def __str__(self):\n        return 'real'\nr = getattr(f, S('__globals__'), None)"
    ),
    "CVE-2026-4963 decorator": Attack(f"{F}@f.__globals__.get\nclass __builtins__:\n    pass\nr = f.__globals__"),
    "CVE-2026-2654 request": Attack("import urllib.request\nr = urllib.request"),
    "CVE-2026-2654 socket": Attack("import socket\nr = socket"),
    "2094 ctypes": Attack("import ctypes\nr = ctypes"),
    "2271 format": Attack("r = '{0.__class__.__base__.__subclasses__}'.format('a')"),
    "CVE-2025-14931 reduce": Attack("import os\nclass E:\n    def __reduce__(self):\n        return (os.system, ('true',))\nr = E().__reduce__()"),
}  # fmt: skip
ASTEVAL: Final = {
    "CVE-2025-24359 f-string": Attack(f"{F}r = f'{{f.__globals__}}'"),
    "CVE-2025-24359 nested": Attack(f"{F}r = f'{{f.__globals__!r:>{{1}}}}'"),
    "GHSA-vp47-9734-prjw code": Attack(f"{F}r = f.__code__"),
    "GHSA-vp47-9734-prjw replace": Attack(f"{F}f.__code__ = f.__code__.replace(co_consts=(None, 2))\nr = f.__code__"),
    "86 reduce": Attack("r = ''.__reduce_ex__(2)[0].__globals__"),
    "86 reduce by getattr": Attack("r = getattr('', '__reduce_ex__')(2)[0].__globals__"),
}
N8N: Final = {
    "CVE-2026-0863 format": Attack("import math\ntry:\n    '{0.nothing}'.format(math)\nexcept AttributeError as e:\n    r = e.obj"),
    "CVE-2026-49444 traceback": Attack("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    r = e.__traceback__.tb_frame"),
    "CVE-2026-49444 exit": Attack(
        "class M:\n    def __enter__(self):\n        return 1\n    def __exit__(self, kind, value, tb):\n        global r\n        r = tb.tb_frame\n"
        "        return True\nwith M():\n    1 / 0"
    ),
    "CVE-2026-49444 match": Attack("def gen():\n    yield 1\nmatch gen():\n    case object(gi_frame=r):\n        pass"),
    "CVE-2023-36258 exec": Attack("exec('import os')\nr = os"),
    "CVE-2023-44467 eval": Attack("r = eval('__import__(\"os\")')"),
    "CVE-2024-27444 bases": Attack("r = ''.__class__.__mro__[1].__subclasses__"),
    "CVE-2024-38459 import": Attack("import os\nr = os"),
}
LOCAL_REPLS: Final = {
    "import os": Attack("import os\nr = os.environ['RLM_CANARY']"),
    "open": Attack("with open(CANARY_FILE) as file:\n    r = file.read()"),
    "environ by sys": Attack("import sys\nr = sys.modules['os']"),
    "globals": Attack("r = globals()['__builtins__']"),
    "vars": Attack("import json\nr = vars(json)"),
    "builtins": Attack("r = __builtins__"),
    "a host function's globals": Attack("r = llm_query.__globals__"),
    "a host function's closure": Attack("r = llm_query.__closure__ or llm_query.__globals__"),
    "a host function's self": Attack("r = llm_query.__call__.__self__.__globals__"),
    "compile": Attack("r = compile('1', 'x', 'eval')"),
    "loader": Attack("import json\nr = json.__loader__.get_source.__globals__"),
    "spec": Attack("r = [__spec__, __loader__, __builtins__]"),
    "NFKC": Attack(f"{F}r = f.__\uff47lobals__"),
    "super": Attack("r = super(int, 1).__getattribute__('__class__').__base__.__subclasses__"),
    "metaclass": Attack("class M(type):\n    pass\nclass C(metaclass=M):\n    pass\nr = C.__base__.__subclasses__"),
    "mro": Attack("r = int.mro()[1].__subclasses__"),
    "type with dunder": Attack("C = type('C', (), {'__getattribute__': object.__getattribute__})\nr = C().__class__.__base__.__subclasses__"),
    "partial": Attack(f"{F}import functools\nr = functools.partial(getattr, f, '__globals__')()"),
    "sorted key": Attack(f"{F}r = [getattr(*pair) for pair in [(f, '__globals__')]]"),
    "dataclass field": Attack(
        "from dataclasses import dataclass\nC = type('C', (), {'__annotations__': {'a:int=r.append(__import__(\"os\"))': int}})\nr = []\n"
        "C = dataclass(C)\nr = [__import__('os')]",
        control=False,
    ),
    "asyncio": Attack("import asyncio\nr = asyncio.sys"),
    "gc": Attack("import gc\nr = gc.get_objects()[:1] and gc"),
    "inspect": Attack("import inspect\nr = inspect.currentframe()"),
    "importlib": Attack("import importlib\nr = importlib.import_module('os')"),
    "pickle": Attack("import pickle\nr = pickle.loads(b'cos\\nsystem\\n.')"),
    "lru_cache": Attack(f"{F}import functools\nr = functools.lru_cache(f).__wrapped__.__globals__"),
    "async frame": Attack("async def c():\n    pass\nx = c()\nr = x.cr_frame\nx.close()"),
}  # fmt: skip
ATTACKS: Final = {
    f"{system}: {name}": attack
    for system, attacks in (
        ("RestrictedPython", RESTRICTED_PYTHON), ("smolagents", SMOLAGENTS), ("asteval", ASTEVAL), ("n8n, PAL", N8N), ("RLM", LOCAL_REPLS),
    )
    for name, attack in attacks.items()
}  # fmt: skip


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
