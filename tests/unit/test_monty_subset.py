"""What Monty's subset of Python lacks says so, and names the backends that have it: over the whole surface, not a sample."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Iterator

import pytest

from rlm_sandbox import Context, REPLProtocol, open_repl

from ..conftest import require_usable, variant_state

MODULES = [
    "asyncio", "base64", "binascii", "bisect", "collections", "copy", "csv", "dataclasses", "datetime", "decimal", "functools",
    "hashlib", "itertools", "json", "math", "os", "pathlib", "random", "re", "sys", "time", "tomllib", "typing", "unicodedata",
]  # fmt: skip
IMPORTS = "import re, collections, datetime, decimal, pathlib, hashlib, random"
#: An instance of each type that ordinary code calls methods of.
INSTANCES = (
    "'ab'", "b'ab'", "5", "True", "1.5", "1j", "[1]", "(1,)", "{'a': 1}", "{1}", "frozenset({1})", "range(3)", "slice(1)",
    "iter([1])", "re.search('a', 'a')", "re.compile('a')", "collections.Counter('aab')", "collections.defaultdict(list)",
    "collections.deque([1])", "datetime.date(2024, 1, 2)", "datetime.datetime(2024, 1, 2)", "datetime.time(1)",
    "datetime.timedelta(1)", "datetime.timezone.utc", "decimal.Decimal('1.5')", "pathlib.PurePosixPath('/a/b')",
    "hashlib.md5(b'')", "random.Random(1)", "ValueError('x')",
)  # fmt: skip
#: How an engine says that a name does not exist.
MISSING = ("has no attribute", "cannot import", "not defined", "No module", "not support", "not yet")


@pytest.fixture(scope="module")
def session() -> Iterator[REPLProtocol]:
    require_usable("monty", variant_state("monty"))
    with open_repl("monty", recovery=False) as session:
        session.bind("ctx", Context.from_text("a needle"))
        session.bind("ask", str.upper)
        yield session


@pytest.fixture
def repl(session: REPLProtocol) -> REPLProtocol:
    session.reset()
    assert session.exec(IMPORTS).outcome == "ok"
    return session


def silent(repl: REPLProtocol, cells: list[str]) -> list[str]:
    """Those cells that fail for want of a name or feature without saying who has it."""
    found = []
    for code in cells:
        error = repl.exec(code).error or ""
        if any(words in error for words in MISSING) and "use a backend whose capabilities list" not in error:
            found.append(f"{code}: {error}")
    return found


def test_every_builtin(repl: REPLProtocol) -> None:
    assert silent(repl, [name for name in dir(builtins) if not name.startswith("_")]) == []


def test_every_method_of_every_type(repl: REPLProtocol) -> None:
    scope: dict[str, object] = {}
    exec(IMPORTS, scope)
    cells = []
    for text in INSTANCES:
        value = eval(text, scope)
        cells += [
            f"o = {text}\no.{name}{'()' if callable(getattr(value, name)) else ''}"
            for name in dir(value)
            if not name.startswith("_") and name != "gauss_next"  # an attribute of the instance, of the library's own use
        ]
    assert len(cells) > 400
    assert silent(repl, cells) == []


def test_every_method_as_a_value(repl: REPLProtocol) -> None:
    kinds = (str, bytes, int, float, list, dict, set, tuple)
    assert silent(repl, [f"{kind.__name__}.{name}" for kind in kinds for name in dir(kind) if not name.startswith("_")]) == []


def test_every_public_name_of_the_modules_there_are(repl: REPLProtocol) -> None:
    cells = []
    for module in MODULES:
        loaded = importlib.import_module(module)
        names = [name for name in getattr(loaded, "__all__", None) or dir(loaded) if not name.startswith("_")]
        cells += [f"from {module} import {name}" for name in names]
        if module not in ("asyncio", "os", "typing"):
            cells += [f"import {module}\n{module}.{name}" for name in names]
    assert len(cells) > 1000
    assert silent(repl, cells) == []


def test_every_module_of_the_library(repl: REPLProtocol) -> None:
    cells = [f"import {name}" for name in sorted(sys.stdlib_module_names - set(MODULES)) if not name.startswith("_")]
    assert len(cells) > 150
    assert silent(repl, cells) == []
    assert repl.exec("import numpy").error == "ModuleNotFoundError: No module named 'numpy'", "no backend has it for certain"


@pytest.mark.parametrize(
    "code",
    [
        "class E(Exception):\n    pass",
        "class C(metaclass=type):\n    pass",
        "class C:\n    @property\n    def x(self):\n        return 1",
        "class C:\n    @staticmethod\n    def x():\n        return 1",
        "class C:\n    for i in range(2):\n        pass",
        "class C:\n    def __len__(self):\n        return 1",
        "class C:\n    x = 1\n    def __bool__(self):\n        return False",
        "class C:\n    def __lt__(self, other):\n        return True",
        "class C:\n    def __getattr__(self, name):\n        return 1",
        "class C:\n    def __format__(self, spec):\n        return ''",
        "class C:\n    def __iadd__(self, other):\n        return self",
        "def g():\n    yield 1",
        "def g():\n    yield from ()",
        "x = 1\ndel x",
        "d = {1: 2}\ndel d[1]",
        "try:\n    pass\nexcept* ValueError:\n    pass",
        "async def f():\n    async with x:\n        pass",
        "async def f():\n    async for i in x:\n        pass",
        "from math import *",
        "x = 5\nx @= 2",
        "next(x for x in [1])",
        "next(map(str, [1]))",
        "bytes([65])",
        "bytes((65,))",
        "'a'.encode('latin-1')",
        "b'a'.decode('cp1252')",
        "re.findall(rb'a', b'a')",
        "re.sub('a', lambda m: 'b', 'a')",
        "re.compile('a').findall('aa', 1)",
        "re.subn('a', 'b', 'a')",
        "import json\njson.dumps({1: {2}}, default=str)",
        "import json\njson.loads('{}', object_hook=dict)",
        "datetime.timedelta(1) * 1.5",
        "datetime.datetime.fromtimestamp(0)",
        "{1: 2}.items() >= {1: 2}.items()",
        "pow(2, -1, 7)",
        "object()",
        "raise ValueError('a', 1)",
        "raise ConnectionError('x')",
        "open('x', 'w')",
        "import os\nos.listdir('.')",
        "import os\nos.environ",
        "import sys\nsys.exit(1)",
        "import sys\nsys.stdout.write('x')",
        "[1].__next__",
        "sorted(['b'], key=str.lower)",
        "'x = \\ud800'",
        "list(map(ask, ['a']))",
        "sorted(['a'], key=lambda x: ask(x))",
    ],
)
def test_what_is_lacking_names_the_backends_that_have_it(repl: REPLProtocol, code: str) -> None:
    error = repl.exec(code).error
    assert error is not None
    assert "use a backend whose capabilities list" in error
    assert "jail" in error


@pytest.mark.parametrize(
    "code",
    [
        "undefined_name",
        "[1].missing",
        "1 < 'a'",
        "1 + 'a'",
        "round(1, 2, 3)",
        "def f(a):\n    return a\nf(b=1)",
        "def dumps(a):\n    return a\ndumps(1, 2)",
        "'a'.encode('no-such-encoding')",
        "class A:\n    pass\nA().x",
        "from math import nothing",
        "raise ValueError('unknown')",
        "next([])",
        "ctx.missing()",
    ],
)
def test_a_mistake_is_no_gap(repl: REPLProtocol, code: str) -> None:
    error = repl.exec(code).error
    assert error is not None
    assert "capabilities" not in error or code == "next([])"


def test_what_a_model_is_told_is_so(repl: REPLProtocol) -> None:
    told = " ".join(repl.capabilities.notes)
    listed = told.partition("Importable: ")[2].partition(".")[0].split()
    assert listed == MODULES
    for name in listed:
        assert repl.exec(f"import {name}").outcome == "ok", name
    for code, value in (
        ("d = {1: 2}\nd.pop(1)", "2"),
        ("sorted(['b', 'A'], key=lambda w: w.lower())", "['A', 'b']"),
        ("[ask(x) for x in ['a', 'b']]", "['A', 'B']"),
        ("len(ctx), ctx[2:8], 'needle' in ctx, [len(d) for d in ctx]", "(8, 'needle', True, [8])"),
        ("same = ctx\nsame.len_chars(), same.slice(2, 8)", "(8, 'needle')"),
    ):
        assert repl.exec(code).value == value, code
    for code in (
        "class E(Exception):\n    pass",
        "class L:\n    def __len__(self):\n        return 1",
        "next(zip([1]))",
        "sorted('a', key=str.lower)",
    ):
        assert repl.exec(code).outcome == "error", code
    for name in ("init", "repr", "eq", "add", "getitem", "iter", "call"):
        assert f"__{name}__" in told
    special = "class C:\n    def __init__(self):\n        self.n = 1\n    def __repr__(self):\n        return 'C'\n    def __eq__(self, o):\n        return True"
    special += "\n    def __add__(self, o):\n        return 'sum'\n    def __getitem__(self, i):\n        return i\n    def __iter__(self):\n        return iter([1])"
    special += "\n    def __call__(self):\n        return 'called'\nc = C()\nc, c == 1, c + 1, c[7], list(c), c()"
    assert repl.exec(special).value == "(C, True, 'sum', 7, [1], 'called')"
