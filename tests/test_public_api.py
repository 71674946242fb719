"""What ``import rlm_sandbox`` gives, and what it must not do."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rlm_sandbox
from rlm_sandbox import backend_names

PACKAGE = Path(rlm_sandbox.__file__).parent
CONTRACT = ["errors", "limits", "results", "protocol", "binding", "options", "registry", "context"]


def public_names(module: ModuleType) -> set[str]:
    """Names without an underscore that are no submodules and no leftovers of ``from __future__``."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }


def test_all_is_a_tuple_of_every_public_name() -> None:
    assert isinstance(rlm_sandbox.__all__, tuple)
    assert len(set(rlm_sandbox.__all__)) == len(rlm_sandbox.__all__)
    assert set(rlm_sandbox.__all__) == public_names(rlm_sandbox)


def test_the_package_only_re_exports() -> None:
    for node in ast.parse((PACKAGE / "__init__.py").read_text("utf-8")).body:
        assert isinstance(node, ast.ImportFrom | ast.Assign | ast.Expr | ast.AnnAssign | ast.If), (
            f"line {node.lineno} does something"
        )


@pytest.mark.parametrize("name", CONTRACT)
def test_every_name_in_all_exists(name: str) -> None:
    module = importlib.import_module(f"rlm_sandbox.{name}")
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.__all__ names {public}"


@pytest.mark.parametrize("name", CONTRACT)
def test_public_things_have_docstrings(name: str) -> None:
    module = importlib.import_module(f"rlm_sandbox.{name}")
    for public in module.__all__:
        value = getattr(module, public)
        if isinstance(value, type) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), f"{name}.{public} has no docstring"


def imported_by(code: str) -> set[str]:
    """The modules loaded in a fresh interpreter after ``code``."""
    probe = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_no_engine_and_no_face() -> None:
    loaded = imported_by("import rlm_sandbox")
    for heavy in (
        "openai",
        "rich",
        "typer",
        "pydantic_monty",
        "RestrictedPython",
        "wasmtime",
        "docker",
        "psutil",
        "httpx",
        "numpy",
        "asyncio.subprocess",
    ):
        assert heavy not in loaded, f"import rlm_sandbox loads {heavy}"
    assert not {name for name in loaded if name.startswith("rlm_sandbox.backends.")}


def test_importing_starts_nothing() -> None:
    """No thread, no child, no open file, nothing printed, no environment read that could fail."""
    probe = (
        "import os, sys, threading\n"
        "before = set(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else set()\n"
        "import rlm_sandbox\n"
        "after = set(os.listdir('/proc/self/fd')) if before else set()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert before == after, (before, after)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env={}, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_errors_have_one_root() -> None:
    errors = importlib.import_module("rlm_sandbox.errors")
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), rlm_sandbox.SandboxError)


def test_the_message_of_every_error_says_what_to_do() -> None:
    error = rlm_sandbox.BackendUnavailable("jail", "no user namespaces", "run: sysctl -w ...")
    assert str(error) == "backend 'jail' is unavailable: no user namespaces; run: sysctl -w ..."
    limit = rlm_sandbox.LimitExceeded("time_seconds", 5, 5.25)
    assert "time_seconds limit of 5 was hit (observed 5.25)" in str(limit)
    assert (limit.kind, limit.limit, limit.observed) == ("time_seconds", 5, 5.25)
    assert str(rlm_sandbox.GuestError("ValueError", "no")) == "ValueError: no"
    assert isinstance(rlm_sandbox.UnsendableValue("x"), ValueError)


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_backend_names_are_known_without_importing_one() -> None:
    assert {"jail", "monty"} <= set(backend_names())
