"""Who may import whom, read from the sources without importing them.

The layers, lowest first: the contract, ``wire``, ``context``, ``bridge``, ``backends``, and above the contract and the
registry the orchestrator, then the faces. Beside them the guest side, which is bundled into guests: standard library and
each other, by relative imports only, because inside the bundle the package has another name.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "rlm_sandbox"

#: The contract: data, errors, the protocol, and the registry, which imports a backend lazily by name.
CONTRACT = ("errors", "limits", "results", "protocol", "binding", "options", "registry")
#: Runs inside guests.
GUEST = ("wire", "context.view", "context.stored", "context.backing", "prelude", "confine", "runners")

#: First part of a module's name below ``rlm_sandbox`` (or a longer prefix) to what it may import inside the package.
#: The longest prefix that fits counts. A package may always import from itself.
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "limits": (),
    "results": (),
    "binding": (),
    "options": (),
    "protocol": ("limits", "results"),
    "registry": ("errors", "limits", "options", "protocol"),
    "wire": (),
    "context": ("errors", "confine", "runners"),
    "waiting": (),
    "bridge": (*CONTRACT, "waiting", "wire", "context"),
    "backends": (*CONTRACT, "waiting", "wire", "context", "bridge"),
    "adapters": ("errors", "waiting", "orchestrator"),
    "orchestrator": (*CONTRACT, "waiting", "context", "prelude"),
    "bundle": (),
    "usercache": (),
    # What `doctor` tries: the contract's backends, and the guest side's own confinement, mechanism by mechanism.
    "diagnosis": (*CONTRACT, "confine", "runners.mapped_text", "backends.jail.cgroups"),
    # The guest side.
    "context.view": GUEST,
    "context.stored": GUEST,
    "context.backing": GUEST,
    "prelude": GUEST,
    "confine": GUEST,
    "runners": GUEST,
}
#: A backend may also use the guest side's sources: it bundles and launches them.
ALLOWED["backends"] += ("bundle", "usercache", "confine", "runners", "prelude")

#: The faces may import anything public: no private module, and no backend but through the registry.
FACES_MAY_NOT = ("backends", "wire", "confine", "runners")

#: Third-party packages and who may import them, at the top of a module or inside a function.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "rlm_guest": ("runners.archive_main",),  # the guest side itself, under its name in the archive
    "pydantic_monty": ("backends.monty",),
    "RestrictedPython": ("backends.restricted",),
    "rlm_policy": ("backends.restricted.policy.guest_boot",),  # the policy itself, under its name in a guest
    "docker": ("backends.docker",),
    "requests": ("backends.docker",),  # docker-py's transport, for its exceptions
    "packaging": ("backends.jail",),
    "wasmtime": ("backends.wasm",),
    "componentize_py": ("backends.wasm.build",),
    "wit_world": ("runners.wasm_main",),  # what the component's tool makes of the guest's interface
    "openai": ("adapters",),
    "prompt_toolkit": ("repl",),
    "rich": ("console", "cli", "doctor", "repl", "__main__"),
    "typer": ("cli", "__main__"),
}


class Imported(NamedTuple):
    """One import: the module that was named, and where."""

    target: str
    relative: bool
    at_top: bool
    line: int


def modules() -> dict[str, Path]:
    """Dotted names below the package, the package itself as ``""``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@cache
def imports(name: str) -> tuple[Imported, ...]:
    return tuple(_imports(name))


def _imports(name: str) -> Iterator[Imported]:
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1] if name else []
    tree = ast.parse(path.read_text("utf-8"))
    top = set(_top_level(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Imported(alias.name, False, node in top, node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert len(package) >= node.level - 1, f"{path}:{node.lineno} imports from above the package"
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            # ``from . import x`` and ``from ..wire import codec`` name modules; ``from .codec import Encoder`` does not.
            for alias in node.names:
                dotted = ".".join([*base, alias.name])
                yield Imported(dotted if dotted in MODULES else ".".join(base), True, node in top, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            yield Imported(node.module or "", False, node in top, node.lineno)


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported; not those for type checkers alone."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        for field in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                pending.extend(getattr(node, field, []))


def inside(name: str) -> list[tuple[str, Imported]]:
    """The imports of ``name`` that stay in the package, as names below it."""
    found = []
    for item in imports(name):
        if item.relative:
            found.append((item.target, item))
        elif below(item.target, "rlm_sandbox"):
            found.append((item.target.partition(".")[2], item))
    return found


def outside(name: str) -> list[tuple[str, Imported]]:
    """The third-party packages ``name`` imports."""
    found = []
    for item in imports(name):
        package = item.target.partition(".")[0]
        if not item.relative and package != "rlm_sandbox" and package not in sys.stdlib_module_names:
            found.append((package, item))
    return found


def layer(name: str) -> str | None:
    """The longest prefix of ``name`` that has a rule, or None for a face."""
    fitting = [prefix for prefix in ALLOWED if below(name, prefix)]
    return max(fitting, key=len, default=None)


def test_every_rule_is_about_something() -> None:
    for prefix in ALLOWED:
        assert any(below(name, prefix) for name in MODULES), f"there is no {prefix}; remove its rule"
    assert {layer(name) for name in MODULES if layer(name)} == set(ALLOWED)


@pytest.mark.parametrize("name", [name for name in MODULES if name and layer(name)])
def test_a_layer_imports_only_what_is_below_it(name: str) -> None:
    rule = layer(name)
    assert rule is not None
    for target, item in inside(name):
        allowed = below(target, rule) or any(below(target, prefix) for prefix in ALLOWED[rule])
        assert allowed, (
            f"{name}:{item.line} imports {target or 'the package itself'}; {rule} may import {ALLOWED[rule] or 'nothing'}"
        )


@pytest.mark.parametrize("name", [name for name in MODULES if below(name, "backends") and name.count(".") >= 1])
def test_a_backend_never_imports_another(name: str) -> None:
    mine = name.split(".")[1]
    for target, item in inside(name):
        if below(target, "backends"):
            assert target.split(".")[1:2] == [mine], f"{name}:{item.line} imports {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if name and not layer(name)])
def test_a_face_goes_through_the_contract(name: str) -> None:
    for target, item in inside(name):
        assert not any(below(target, prefix) for prefix in FACES_MAY_NOT), f"{name}:{item.line} imports {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if any(below(name, prefix) for prefix in GUEST)])
def test_the_guest_side_is_the_standard_library_and_itself(name: str) -> None:
    for item in imports(name):
        where = f"{name}:{item.line} imports {item.target}"
        if name == "runners.archive_main" and below(item.target, "rlm_guest"):
            continue  # the archive's start script stands outside its package
        if name == "runners.wasm_main" and item.target == "wit_world":
            continue  # made from the guest's interface when its component is built
        if item.relative:
            assert any(below(item.target, prefix) for prefix in GUEST) or item.target == "context", where
        else:
            assert item.target.partition(".")[0] in sys.stdlib_module_names, (
                f"{where}; the guest bundle has other names: import relatively"
            )


@pytest.mark.parametrize("name", MODULES)
def test_third_party_packages_stay_where_they_belong(name: str) -> None:
    for package, item in outside(name):
        assert package in THIRD_PARTY, f"{name}:{item.line} imports {package}, which no rule knows"
        assert any(below(name, prefix) for prefix in THIRD_PARTY[package]), f"{name}:{item.line} imports {package}"


def test_the_orchestrator_names_no_backend() -> None:
    backends = {name.split(".")[1] for name in MODULES if below(name, "backends") and "." in name}
    for name, path in MODULES.items():
        if below(name, "orchestrator"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert node.value not in backends, f"{name}:{node.lineno} names the backend {node.value}"


#: The ways to run code or revive objects from bytes, which no guest bytes may ever reach.
_BANNED = ("pickle", "marshal", "shelve", "dill", "cloudpickle")


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_pickled(name: str) -> None:
    for item in imports(name):
        assert item.target.partition(".")[0] not in _BANNED, f"{name}:{item.line}"


#: Where ``ctypes`` may be used, and what for.
_CTYPES = {
    "backends.wasm._capi_unsafe": "calls of the engine's library that its package does not wrap",
    "backends.wasm._stack_unsafe": "how large the stack is that a guest is about to run on",
    "confine._syscalls_unsafe": "raw system calls",
    "context.backing": "memory files, on Pythons that do not know them",
    "runners.mapped_text": "making a str over mapped memory",
}


@pytest.mark.parametrize("name", MODULES)
def test_ctypes_stays_in_the_files_that_say_why(name: str) -> None:
    if any(item.target.partition(".")[0] == "ctypes" for item in imports(name)):
        assert name in _CTYPES, f"{name} uses ctypes; raw system calls live in confine/_syscalls_unsafe.py"
