"""What a guest is told about a feature this subset of Python lacks: its name, and which backends have it."""

from __future__ import annotations

import functools
import importlib
import re
from types import FunctionType
from typing import Final

from ...errors import BackendUnavailable
from ...protocol import Feature
from ...registry import SessionConfig, backend_names, load_backend

__all__ = ("remedy", "with_remedy")

#: How the engine names what it lacks, and the declared feature that has it.
_FEATURES: Final = (
    ("class inheritance", Feature.INHERITANCE), ("yield", Feature.GENERATORS), ("'del'", Feature.DEL),
)  # fmt: skip
_ATTRIBUTE: Final = re.compile(
    r"AttributeError: (?:'(\w{1,20})' object|type object '(\w{1,20})'|module '(\w{1,20})') has no attribute '(\w{1,60})'"
)
_TYPES: Final = {
    kind.__name__: frozenset(dir(kind)) for kind in (str, bytes, int, float, complex, list, tuple, dict, set, frozenset)
} | {"function": frozenset(dir(FunctionType))}
#: Modules the subset has in part.
_MODULES: Final = frozenset(
    {
        "asyncio", "base64", "binascii", "bisect", "collections", "copy", "csv", "dataclasses", "datetime", "decimal", "functools",
        "hashlib", "itertools", "json", "math", "os", "pathlib", "random", "re", "sys", "time", "tomllib", "typing", "unicodedata",
    }
)  # fmt: skip
_IN_A_CALLBACK: Final = "cannot suspend in this synchronous context"


@functools.cache
def remedy(feature: Feature) -> str:
    """The sentence that ends an error about a feature this backend does not have."""
    having = []
    for name in backend_names():
        try:
            capabilities = load_backend(name).capabilities(SessionConfig())
        except (BackendUnavailable, ImportError):
            continue
        if capabilities.has(feature):
            having.append(name)
    return f"use a backend whose capabilities list {feature.value!r}: {' or '.join(having) or 'none is installed'}"


def with_remedy(name: str, text: str) -> str:
    """An uncaught error's text, with the remedy if it speaks of something that this subset lacks.

    Args:
        name: the error's type.
        text: ``"Type: message"``, the guest's words; it can only fool itself.
    """
    start = text[:300]
    if name == "NotImplementedError" and _IN_A_CALLBACK in start:
        return f"{text}: call the host in a loop or a comprehension, [f(x) for x in xs], and sort by what it returned"
    if name in ("NotImplementedError", "TypeError") and ("not yet support" in start or "not supported" in start):
        return f"{text}; {remedy(next((feature for words, feature in _FEATURES if words in start), Feature.CPYTHON))}"
    found = _ATTRIBUTE.fullmatch(start) if name == "AttributeError" else None
    if found is None:
        return text
    instance, kind, module, attribute = found.groups()
    if attribute not in (_module_names(module) if module else _TYPES.get(instance or kind, ())):
        return text
    if module or attribute.startswith("_") or attribute not in _METHODS_AS_VALUES:
        return f"{text} in this subset of Python; {remedy(Feature.CPYTHON)}"
    return f"{text} as a value in this subset of Python: write lambda x: ..., or {remedy(Feature.CPYTHON)}"


#: Methods that exist when they are called, so that their absence means that one was used as a value.
_METHODS_AS_VALUES: Final = (frozenset(dir(str)) | frozenset(dir(list)) | frozenset(dir(dict))) - {"translate", "maketrans"}


@functools.cache
def _module_names(module: str) -> frozenset[str]:
    return frozenset(dir(importlib.import_module(module))) if module in _MODULES else frozenset()
