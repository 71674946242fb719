"""What a restricted cell can reach and change by attributes, found by trying all of them; verdicts from the host.

The walks go through the session's own guards, from everything a cell finds by name, so that what is added to the language later is walked
too.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import textwrap
import types
from typing import Any, Final

import pytest

from rlm_sandbox import Context, Grade, Limits, open_repl

from ..conftest import require_usable, variant_state


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    require_usable("restricted", variant_state("restricted"))


#: One of everything that functions of the language return.
_OBJECTS: Final = """
class A:
    pass
def f():
    yield
class E(enum.Enum):
    Q = 1
@dataclasses.dataclass
class D:
    a: int = 1
errors = []
for wrong in (lambda: 1 / 0, lambda: None.x, lambda: llm_query(f), lambda: json.loads('{'), lambda: [].pop(), lambda: int('x')):
    try:
        wrong()
    except Exception as error:
        errors.append(error)
objects = [
    A(), f(), E.Q, D(), (x for x in [1]), lambda: 1, re.match('a', 'a'), re.compile('a'), functools.partial(f), functools.lru_cache(f),
    collections.namedtuple('N', 'a b')(1, 2), contextlib.contextmanager(f)(), datetime.datetime.now(), iter([]), io.StringIO(), io.BytesIO(),
    csv.writer(io.StringIO()), csv.DictReader(io.StringIO('a')), typing.List['x'], typing.Optional[int], typing.TypeVar('T'), hashlib.md5(),
    difflib.SequenceMatcher(), itertools.count(), decimal.Decimal(1), fractions.Fraction(1), enum.auto(), dataclasses.field(),
    dataclasses.fields(D), object(), property(f), staticmethod(f), classmethod(f), slice(1), range(3), zip(), map(f, []), {}.keys(),
    collections.ChainMap(), collections.Counter(), collections.deque(), operator.itemgetter(1), operator.attrgetter('a'), time.gmtime(),
    ctx.find('needle'), ctx.metadata(), 'x'.format, str.format,
]
aliases = (typing.List['x'], typing.Optional[int])
kinds = [type(item) for item in [*[o for o in objects if not any(o is a or o == a for a in aliases)], *errors, print, sum, len, sys, sys.stdout, type, ctx, llm_query, A, E, getattr, HostCallError]]
"""  # fmt: skip
_FORBIDDEN: Final = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType, types.CellType)
#: Objects of this package that a cell holds on purpose: nothing of the host hangs on them by a name that a cell may say.
_OWN: Final = {
    "GuestClass", "GuestEnum", "_Facade",
    "module", "_Stream", "Importer", "TypeOf",
}  # fmt: skip
_DEPTH: Final = 4
_PASSIVE: Final = (str, bytes, int, float, types.BuiltinMethodType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType)  # fmt: skip


def test_nothing_of_the_host_is_reached_by_attributes() -> None:
    context = Context.from_documents(["a needle"], metadata={"files": ["one.txt"]})
    with open_repl("restricted", limits=Limits(time_seconds=60), accept=Grade.NONE, trusted=True) as repl:
        policy: Any = repl._policy  # type: ignore[attr-defined]
        modules = policy.builtins["__import__"]._modules
        repl.bind("ctx", context)
        repl.bind("llm_query", str.upper)
        result = repl.exec("\n".join(f"import {name}" for name in sorted(modules) if name.isidentifier() and name[0] != "_"))
        assert result.ok
        result = repl.exec(_OBJECTS)
        assert result.ok, result.traceback
        guarded = policy.builtins[".getattr"]
        waiting = collections.deque((name, item, 0) for name, item in policy.names.items() if not name.startswith("__"))
        waiting.extend((name, item, 0) for name, item in policy.builtins.items() if not name.startswith((".", "__")))
        secrets = [policy, policy.builtins, policy.names, guarded.__self__, repl, context, os.environ]
        seen: dict[int, Any] = {}
        while waiting:
            path, item, depth = waiting.popleft()
            if id(item) in seen:
                continue
            seen[id(item)] = item
            assert not isinstance(item, _FORBIDDEN), f"{path} is a {type(item).__name__}"
            assert not any(item is secret for secret in secrets), f"{path} is the host's {type(item).__name__}"
            kind = type(item)
            assert not kind.__module__.startswith("rlm_sandbox") or kind.__name__ in _OWN, f"{path} is {item!r}"
            if depth == _DEPTH or (depth > 1 and isinstance(item, _PASSIVE)):
                continue
            if kind in (list, tuple, set, frozenset):
                waiting.extend((f"{path}[]", part, depth + 1) for part in list(item)[:100])
            elif kind is dict:
                waiting.extend((f"{path}[{key!r:.30}]", part, depth + 1) for key, part in list(item.items())[:500])
            for name in {
                *dir(item),
                "__name__",
                "__dict__",
                "__class__",
                "__doc__",
                "__self__",
                "__func__",
                "__globals__",
                "__builtins__",
            }:
                try:
                    found = guarded(item, name)
                except Exception:
                    continue
                waiting.append((f"{path}.{name}", found, depth + 1))
        assert len(seen) > 5_000, "the walk did not get anywhere"


_MUTATE: Final = """
import json, sys, types
from rlm_sandbox import Context, Grade, Limits, open_repl

def fingerprint(names):
    found = {}
    for name in names:
        module = sys.modules.get(name)
        for key, value in vars(module).items() if module else ():
            where = f"{name}.{key}"
            found[where] = id(value)
            if isinstance(value, type):
                found.update((f"{where}.{k}", id(v)) for k, v in vars(value).items() if k not in ("__abstractmethods__", "_abc_impl"))
            elif isinstance(value, types.FunctionType):
                found[f"{where}()"] = (id(value.__code__), repr(value.__defaults__), repr(value.__kwdefaults__), sorted(vars(value)))
            elif type(value) in (list, dict, set) and not key.startswith("_"):
                found[f"{where}[]"] = len(value)
    return found

def functions(repl):
    return repl.exec(LIST + "\\nfound", read=("found",)).read["found"]

LIST = "\\n".join(f"import {n}" for n in NAMES) + "\\nfound = [id(getattr(m, n)) for m in (" + ", ".join(NAMES) + ") for n in dir(m)]"
ATTACK = "\\n".join(f"import {n}" for n in NAMES) + '''
done = {}
tried = 0
def attack(obj, depth):
    global tried
    if id(obj) in done:
        return
    done[id(obj)] = obj
    for name in dir(obj):
        try:
            value = getattr(obj, name)
        except Exception:
            continue
        if isinstance(value, (list, dict, set)):
            value.clear()
        if depth:
            attack(value, depth - 1)
        for change in (lambda: setattr(obj, name, None), lambda: delattr(obj, name), lambda: setattr(obj, 'mine', 1),
                       lambda: value.update({'mine': 1}), lambda: value.append(1), lambda: value.add(1),
                       lambda: value.register(Mine), lambda: functools.wraps(len)(value), lambda: dataclasses.dataclass(value)):
            tried += 1
            try:
                change()
            except Exception:
                pass
class Mine:
    pass
for module in (%s, print, len, type, str, dict, ValueError, ctx, llm_query, HostCallError):
    attack(module, 2)
''' % ", ".join(NAMES)

context = Context.from_documents(["a needle"], metadata={"files": ["one.txt"]})
def llm_query(prompt):
    return prompt
options = dict(limits=Limits(time_seconds=60), accept=Grade.NONE, trusted=True)
with open_repl("restricted", **options) as first, open_repl("restricted", **options) as second:
    for repl in (first, second):
        repl.bind("ctx", context)
        repl.bind("llm_query", llm_query)
    before, theirs = fingerprint([*NAMES, "builtins", "os"]), functions(second)
    result = first.exec(ATTACK)
    tried = first.get("tried") if result.ok else result.error
    after = fingerprint([*NAMES, "builtins", "os"])
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    with open_repl("restricted", **options) as third:
        fresh = third.exec(SMOKE).value
    print(json.dumps([tried, changed, functions(second) == theirs, second.exec(SMOKE).value, fresh, context.added_metadata,
                      vars(llm_query), second.exec("[ctx.find('needle'), llm_query('x')]").value]))
"""
_SMOKE: Final = (
    "import json, collections, re, random, enum, datetime, statistics\n"
    "class E(enum.Enum):\n    A = 1\n"
    "[json.loads('[1]'), collections.Counter('aab').most_common(1), re.findall('a', 'aa'), E(1).name, random.Random is None "
    "if hasattr(random, 'Random') else 0, datetime.date(2020, 1, 2).isoformat(), statistics.mean([1, 3])]"
)
_EXPECTED: Final = "[[1], [('a', 2)], ['a', 'a'], 'A', 0, '2020-01-02', 2]"


def test_no_attribute_of_a_module_can_be_changed_for_anybody_else() -> None:
    """Every name of every module, and what hangs on it, set, deleted, cleared and registered with, in one of two sessions."""
    from rlm_sandbox.backends.restricted.policy.modules import MODULE_NAMES

    head = f"NAMES = {list(MODULE_NAMES)!r}\nSMOKE = {_SMOKE!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(_MUTATE)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    tried, changed, same, second, fresh, metadata, function, works = json.loads(done.stdout)
    assert isinstance(tried, int), tried
    assert tried > 5_000
    assert changed == []
    assert same, "the other session has other functions now"
    assert second == fresh == _EXPECTED
    assert (metadata, function) == ({"files": ["one.txt"]}, {})
    assert works == "[[(2, 8, 'needle')], 'x']"


#: Found here, not published: `dataclasses` makes source code of the names of fields, and was given a dict that says one name when it is
#: checked and another when it is used, and a field of a class of the cell's own, which said its name itself.
_CHANGING: Final = """
from dataclasses import dataclass, field
name = "a:__import__('os').environ.__setitem__('RLM_OWNED', '1')"
class Changing(dict):
    def __iter__(self):
        return iter(["a"])
    def items(self):
        return [(name, int)]
"""


@pytest.mark.parametrize(
    "code",
    [
        'C = dataclass(repr=False, eq=False)(type("C", (), {"__annotations__": Changing(), name: field(init=False)}))',
        "class C:\n    __annotations__ = Changing()\nC = dataclass(repr=False, eq=False)(C)",
        "class C:\n    a: int = 1\n    __annotations__[name] = int\nC = dataclass(repr=False, eq=False)(C)",
        'C = type("C", (), {"a": 1})\nsetattr(C, "__annotations__", Changing())\nC = dataclass(repr=False, eq=False)(C)',
        (
            "class Field(type(field())):\n    name = property(lambda self: name, lambda self, value: None)\nclass C:\n    a: int = says(Field)\n"
            "dataclass(repr=False, eq=False)(C)"
        ),
        (
            'Field = type("Field", (type(field()),), {"name": property(lambda self: name, lambda self, value: None)})\nclass C:\n    a: int = says(Field)\n'
            "dataclass(repr=False, eq=False)(C)"
        ),
        "import enum\nclass Field(type(field()), enum.Enum):\n    A = 1",
        "field().name = name",
        'C = type("C", (), {"a": 1})\nC.__dict__["__annotations__"] = Changing()\nC = dataclass(repr=False, eq=False)(C)',
    ],
)
def test_a_dataclass_makes_no_source_of_what_a_cell_says_later(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLM_OWNED", raising=False)
    with open_repl("restricted", accept=Grade.NONE, trusted=True) as repl:
        assert repl.exec(_CHANGING).ok
        assert repl.exec(
            "MISSING = field().default\ndef says(cls):\n    return cls(MISSING, MISSING, False, False, None, False, None, False)"
        ).ok
        assert not repl.exec(code).ok
    assert "RLM_OWNED" not in os.environ


#: Found here, not published. Each leaves what it reached in ``r``; the verdict is the host's.
_RAW: Final = (
    "class Y:\n    def __radd__(self, other):\n        global r\n        r = other\n        return other\nclass S(str):\n    pass\n"
)
_WAYS: Final = {
    # An augmented assignment reads its target, too, and gives it to an operator of the cell's.
    "format by an augmented assignment": f"{_RAW}S.format += Y()\nr = r('{{0.__globals__}}', llm_query)",
    "format_map by an augmented assignment": f"{_RAW}s = S('{{x.__globals__}}')\ns.format_map += Y()\nr = r({{'x': llm_query}})",
    "mro by an augmented assignment": f"{_RAW}S.mro += Y()\nr = r()",
    "format by super": "class S(str):\n    def raw(self):\n        return super().format\nr = S('{0.__globals__}').raw()(llm_query)",
    "format_map by super": (
        "class S(str):\n    def raw(self):\n        return super().format_map\nr = S('{x.__globals__}').raw()({'x': llm_query})"
    ),
    "format by a generic alias": "class S[T](str):\n    pass\nr = S[int].format('{0.__globals__}', llm_query)",
    "obj by super": "class E(AttributeError):\n    def reach(self):\n        return super().obj\nr = [E().reach, E().reach()]",
    # An alias passes attributes on to what it is an alias of.
    "obj by a generic alias": (
        "import math\ntry:\n    math.nothing\nexcept AttributeError as e:\n    r = e\nr = type(list[int])(r, ()).obj"
    ),
    "obj by a bound method": "class E(AttributeError):\n    def __call__(self):\n        pass\nr = type(print)(E(), 1).obj",
    # The documentation of a dataclass is its signature, and the signature of a base that it has in words is evaluated in the host's modules.
    "a dataclass with a base's words for a signature": (
        "from dataclasses import dataclass\nclass A:\n    '''A(x=rlm_vault.KEY)\n--\n\n'''\n"
        "@dataclass(init=False)\nclass C(A):\n    pass\nr = C.__doc__\nr = r.index('canary')"
    ),
    "the same with a documentation that says no twice": (
        "from dataclasses import dataclass\nclass A:\n    '''A(x=rlm_vault.KEY)\n--\n\n'''\nclass No:\n    __bool__ = lambda self: False\n"
        "@dataclass(init=False)\nclass C(A):\n    __doc__ = No()\nr = C.__doc__\nr = r.index('canary')"
    ),
    "a dataclass whose fields a pattern reads": (
        "from dataclasses import dataclass\n@dataclass\nclass D:\n    gi_frame: object = None\ndef g():\n    yield\nmatch g():\n    case D(r):\n        pass\nr"
    ),
}


@pytest.mark.parametrize("code", _WAYS.values(), ids=_WAYS)
def test_an_unpublished_way_out_is_closed(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = types.ModuleType("rlm_vault")
    vault.KEY = "canary-77c1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlm_vault", vault)
    with open_repl("restricted", accept=Grade.NONE, trusted=True) as repl:
        repl.bind("llm_query", str.upper)
        result = repl.exec(code)
        assert result.outcome == "error", result.value
        assert "canary" not in f"{result.value}{result.error}"
        # A format of the host's own function says so; the one of `str` would have said what is in it.
        assert "__builtins__" not in str(repl.exec("r").value)
        assert repl.exec("[S('{0}').format(5), '{0}'.format(5)] if 'S' in session_names() else 0").ok


#: `copy` makes an instance anew by what the instance says, and sets attributes of what that makes.
_COPIERS: Final = ("copy.copy(a)", "copy.deepcopy([a])", "dataclasses.asdict(D(a))", "dataclasses.astuple(D(a))")


@pytest.mark.parametrize("copier", _COPIERS)
@pytest.mark.parametrize(
    "made",
    [
        "a = A()\na.__dict__['__reduce_ex__'] = lambda protocol: (lambda: target, (), (None, change))",
        "a = A()\na.__dict__['__reduce__'] = lambda: (lambda: target, (), (None, change))",
        "class L(collections.Counter):\n    pass\na = L()\na.__dict__['__reduce__'] = lambda: (lambda: target, (), (None, change))",
        "class N:\n    __slots__ = ('most_common',)\n    def __new__(cls):\n        return target\na = N()",
        "N = type('N', (), {'__new__': lambda cls: target})\na = N()",
        "class R:\n    def __reduce__(self):\n        return (lambda: target, (), (None, change))\na = R()",
        "class R:\n    __slots__ = ('__reduce_ex__',)\na = R()",
        "a = type(list[int])(lambda: target, ())()",
        "import typing\nclass X(type(typing.List[int])):\n    pass\nx = X(list, int)\nx.__dict__['__origin__'] = lambda: target\na = x()",
        "a = A()\na.__reduce_ex__ = lambda protocol: (lambda: target, (), (None, change))",
        "a = A()\nsetattr(a, '__reduce_ex__', lambda protocol: (lambda: target, (), (None, change)))",
    ],
)
def test_a_copy_changes_nothing_but_itself(made: str, copier: str) -> None:
    before = dict(vars(collections.Counter))
    try:
        with open_repl("restricted", accept=Grade.NONE, trusted=True) as repl:
            assert repl.exec(
                "import collections, copy, dataclasses\nclass A:\n    pass\n@dataclasses.dataclass\nclass D:\n    x: object\n"
                "target = collections.Counter\nchange = {'most_common': lambda self, n=None: 'mine', 'mine': 1}"
            ).ok
            repl.exec(made)
            repl.exec(copier)
            assert dict(vars(collections.Counter)) == before
    finally:
        for name in set(vars(collections.Counter)) - set(before):
            delattr(collections.Counter, name)
        if collections.Counter.most_common is not before["most_common"]:
            collections.Counter.most_common = before["most_common"]  # type: ignore[method-assign]


_TEXT: Final = """
import sys
class B(bytes):
    def __len__(self):
        return 0
class S(str):
    def __str__(self):
        return self
    def __len__(self):
        return 1
    def __getitem__(self, key):
        return 7
    def encode(self, *how):
        return [1]
    def join(self, parts):
        return [2]
    def __add__(self, other):
        return [3]
    __radd__ = __add__
class R:
    def __repr__(self):
        return S('x' * 10)
class E(Exception):
    def __str__(self):
        return S('x' * 10)
class A:
    def __radd__(self, other):
        return [4]
"""


def test_a_text_with_methods_of_its_own_is_a_text_to_the_host() -> None:
    """What a cell shows is taken as characters: no method of it runs in the host, where no cell is and no clock."""
    with open_repl("restricted", accept=Grade.NONE, trusted=True) as repl:
        assert repl.exec(_TEXT).ok
        assert repl.exec("R()").value == "x" * 10
        result = repl.exec("raise E")
        assert (result.outcome, result.error) == ("error", f"E: {'x' * 10}")
        assert repl.exec("print(S('a'), S('b'), sep=S('-'), end=S('.'))\nsys.stdout.write(S('c'))").stdout == "a-b.c"
        assert repl.exec("print(1, end=A())").error == "TypeError: end must be None or a string, not A"
        assert repl.exec("q = R()", read=("q",)).read["q"].repr == "x" * 10
        assert repl.get("q").repr == "x" * 10
        assert type(repl.get("q").repr) is str
