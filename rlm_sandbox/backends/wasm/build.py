"""Builds the guest component from this package's guest-side sources. ``python -m rlm_sandbox.backends.wasm.build DIRECTORY``

The tool that makes a component of Python sources is needed here only; a wheel carries the result.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Final

from ...errors import BackendUnavailable
from .progress import progress

__all__ = ("COMPONENT_NAME", "RECORD_NAME", "build", "can_build", "sources_digest")

COMPONENT_NAME: Final = "guest.wasm"
RECORD_NAME: Final = "guest.json"
_TOOL: Final = "componentize-py"
_PACKAGE: Final = "rlm_guest"
_MODULE: Final = f"{_PACKAGE}.runners.wasm_main"
_WIT: Final = "wasm.wit"
_SECONDS: Final = 600
#: What runs in the guest; the other runners need processes and sockets.
_FILES: Final = (
    "context/view.py",
    "runners/__init__.py", "runners/host_calls.py", "runners/output.py", "runners/proxies.py", "runners/session.py",
    "runners/wasm_loop.py", "runners/wasm_main.py", "runners/wasm_modules.py", "runners/wasm_shims.py", "runners/wasm.wit",
    "wire/__init__.py", "wire/codec.py", "wire/frames.py", "wire/messages.py", "wire/strings.py",
)  # fmt: skip


def _sources() -> dict[str, bytes]:
    root = resources.files("rlm_sandbox")
    return {name: root.joinpath(name).read_bytes() for name in _FILES}


def sources_digest() -> str:
    """Names the sources a component is built from."""
    digest = hashlib.sha256()
    for name, data in sorted(_sources().items()):
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def can_build() -> bool:
    """Whether the tool is installed."""
    return importlib.util.find_spec("componentize_py") is not None


def build(directory: Path) -> None:
    """Write the component and its record into ``directory``.

    Raises:
        BackendUnavailable: the tool failed, or ``directory`` cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="rlm-sandbox-build-") as name, progress("building the wasm guest, once"):
        work = Path(name)
        _lay_out(work)
        made = work / COMPONENT_NAME
        _run_tool(work, made)
        record = {
            "digest": hashlib.sha256(made.read_bytes()).hexdigest(),
            "sources": sources_digest(),
            "tool": f"{_TOOL} {importlib.metadata.version(_TOOL)}",
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _put(made.read_bytes(), directory / COMPONENT_NAME)
            _put(json.dumps(record, indent=1).encode(), directory / RECORD_NAME)
        except OSError as exc:
            raise BackendUnavailable(
                "wasm", f"{str(directory)!r} cannot be written ({exc.strerror})", "set RLM_SANDBOX_CACHE to a writable directory"
            ) from None


def _lay_out(work: Path) -> None:
    for name, data in _sources().items():
        target = work / "wit" / _WIT if name.endswith(".wit") else work / "app" / _PACKAGE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    for package in ("", "context"):
        (work / "app" / _PACKAGE / package / "__init__.py").touch()


def _run_tool(work: Path, made: Path) -> None:
    command = ["-d", str(work / "wit"), "-w", "sandbox", "componentize", "-p", str(work / "app"), _MODULE, "-o", str(made)]
    program = f"import sys, componentize_py; sys.argv[1:] = {command!r}; sys.exit(componentize_py.script())"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=work, env=environment, capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BackendUnavailable("wasm", f"the guest component could not be built ({exc})", "try again") from None
    if done.returncode or not made.exists():
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise BackendUnavailable("wasm", f"the guest component could not be built: {lines[0][:300]}", f"reinstall {_TOOL}")


def _put(data: bytes, target: Path) -> None:
    """Whole or not at all: another process may be reading."""
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def main() -> int:
    """Build into the directory named by the first argument."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("guest")
    if shutil.disk_usage(target.parent if target.parent.exists() else Path()).free < 200 << 20:
        sys.stderr.write("there is hardly any room on that disk; free 200 MB\n")
        return 1
    build(target)
    sys.stdout.write(f"{target / COMPONENT_NAME}: {(target / COMPONENT_NAME).stat().st_size:,} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
