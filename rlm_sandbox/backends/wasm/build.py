"""Builds the guest component from this package's guest-side sources.

Standard library only, and nothing of this package: the wheel's build runs this file before there is a package. The tool that
makes a component of Python sources is needed here alone.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

__all__ = ("COMPONENT_NAME", "RECORD_NAME", "TOOL", "BuildFailed", "build", "can_build", "is_current", "sources_digest")

COMPONENT_NAME: Final = "guest.wasm"
RECORD_NAME: Final = "guest.json"
TOOL: Final = "componentize-py==0.25.1"
_TOOL_NAME: Final = TOOL.partition("=")[0]
_PACKAGE: Final = "rlm_guest"
_MODULE: Final = f"{_PACKAGE}.runners.wasm_main"
_SECONDS: Final = 600
_ROOT: Final = Path(__file__).parents[2]
#: The guest's own module; what it imports of this package, by relative imports, comes along.
_MAIN: Final = "runners/wasm_main.py"
_INTERFACE: Final = "runners/wasm.wit"


class BuildFailed(Exception):
    """The component was not built. The text says why."""


def _sources() -> dict[str, bytes]:
    """The interface and every module the guest imports, found by reading them: a list would be wrong with the next import."""
    found = {_INTERFACE: _ROOT.joinpath(_INTERFACE).read_bytes()}
    waiting = [_MAIN, "runners/__init__.py", "wire/__init__.py"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _ROOT.joinpath(name).read_bytes()
            waiting += _imported(name, found[name])
    return found


def _imported(name: str, source: bytes) -> list[str]:
    """The files of the modules that the file ``name`` imports relatively."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = _ROOT.joinpath(name).parents[node.level - 1]
            module = folder.joinpath(*(node.module or "").split("."))
            candidates = [module.with_suffix(".py")] if node.module else []
            candidates += [module / f"{alias.name}.py" for alias in node.names]
            found += [path.relative_to(_ROOT).as_posix() for path in candidates if path.is_file()]
    return found


def sources_digest() -> str:
    """Names the sources a component is built from, and the tool."""
    digest = hashlib.sha256(TOOL.encode())
    for name, data in sorted(_sources().items()):
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def can_build() -> bool:
    """Whether the tool is installed, in the version that is wanted."""
    try:
        return f"{_TOOL_NAME}=={importlib.metadata.version(_TOOL_NAME)}" == TOOL
    except importlib.metadata.PackageNotFoundError:
        return False


def is_current(directory: Path) -> bool:
    """Whether ``directory`` holds, whole, the component of these sources."""
    try:
        record = json.loads((directory / RECORD_NAME).read_bytes())
        data = (directory / COMPONENT_NAME).read_bytes()
        return bool(record["sources"] == sources_digest() and record["digest"] == hashlib.sha256(data).hexdigest())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build(directory: Path) -> None:
    """Write the component and its record into ``directory``.

    Raises:
        BuildFailed: the tool failed.
        OSError: ``directory`` cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="rlm-sandbox-build-") as name:
        work = Path(name)
        _lay_out(work)
        made = work / COMPONENT_NAME
        _run_tool(work, made)
        data = made.read_bytes()
        record = {"digest": hashlib.sha256(data).hexdigest(), "sources": sources_digest(), "tool": TOOL}
        directory.mkdir(parents=True, exist_ok=True)
        _put(data, directory / COMPONENT_NAME)
        _put(json.dumps(record, indent=1).encode(), directory / RECORD_NAME)


def _lay_out(work: Path) -> None:
    for name, data in _sources().items():
        target = work / "wit" / "guest.wit" if name.endswith(".wit") else work / "app" / _PACKAGE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    for package in ("", "context"):
        (work / "app" / _PACKAGE / package / "__init__.py").touch()


def _run_tool(work: Path, made: Path) -> None:
    command = ["-d", str(work / "wit"), "-w", "sandbox", "componentize", "-p", str(work / "app"), _MODULE, "-o", str(made)]
    program = f"import sys, componentize_py; sys.argv[1:] = {command!r}; sys.exit(componentize_py.script())"
    # The guest's snapshot is taken in a process with this environment; its own is empty.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") or key == "PYTHONPATH"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=work, env=environment, capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BuildFailed(f"{_TOOL_NAME} could not be run ({exc})") from None
    if done.returncode or not made.exists():
        raise BuildFailed(f"{_TOOL_NAME}: {_reason(done.stderr.decode('utf-8', 'replace'))}")


def _reason(said: str) -> str:
    """The line of what the tool said that names an error: a backtrace of its own follows it."""
    lines = [line.strip() for line in said.partition("Stack backtrace:")[0].splitlines() if line.strip()] or ["no message"]
    return lines[-1][:300]


def _put(data: bytes, target: Path) -> None:
    """Whole or not at all: another process may be reading."""
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)  # others use an installation, too; the cache's own directory keeps them out
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
