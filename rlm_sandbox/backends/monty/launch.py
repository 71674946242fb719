"""Starting workers confined: the script the engine executes in place of its program, and whether this kernel allows it."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic_monty._binary import find_monty_binary

__all__ = ("Launcher", "confined_launcher")

_PACKAGE: Final = Path(__file__).parents[2]
_TRY_SECONDS: Final = 20.0
_REMEDY: Final = (
    "allow user namespaces to unprivileged processes (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), "
    "or give up this layer with MontyOptions(confinement='language')"
)
#: The guest side under a name of its own, so that the host's package with its imports is not loaded.
_PROGRAM: Final = """\
import sys, types
package = types.ModuleType("rlm_guest")
package.__path__ = [{package!r}]
sys.modules["rlm_guest"] = package
from rlm_guest.runners.engine_launcher import main
main({binary!r}, {libraries!r}, {parent}, sys.argv[1:])
"""


@dataclass(frozen=True, slots=True)
class Launcher:
    """What the engine is to execute: ``path``, or None with the reason and its remedy."""

    path: str | None
    reason: str = ""
    remedy: str = ""


@functools.cache
def _launcher(parent: int) -> Launcher:
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return Launcher(None, "its workers can be confined by the kernel on x86-64 Linux only", _REMEDY)
    directory = Path(tempfile.mkdtemp(prefix="rlm-sandbox-"))
    try:
        binary = os.path.realpath(find_monty_binary())
        libraries = _libraries(binary)
        program = directory / "worker.py"
        program.write_text(_PROGRAM.format(package=str(_PACKAGE), binary=binary, libraries=libraries, parent=parent))
        script = directory / "worker"
        python = shlex.quote(sys.executable)
        script.write_text(f'#!/bin/sh\nexec {python} -I -S -X utf8 {shlex.quote(str(program))} "$@"\n')
        script.chmod(0o700)
        tried = subprocess.run(
            [str(script), "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRY_SECONDS, env={}, check=False
        )
        if tried.returncode == 0:
            _remove_at_exit(directory, parent)
            return Launcher(str(script))
        reason = tried.stderr[:300].decode("utf-8", "replace").strip() or f"exit status {tried.returncode}"
    except (OSError, subprocess.SubprocessError) as exc:
        reason = f"{type(exc).__name__}"
    shutil.rmtree(directory, ignore_errors=True)
    return Launcher(None, f"its workers cannot be confined by the kernel here ({reason})", _REMEDY)


def confined_launcher() -> Launcher:
    """The launcher for workers of this process, tried once. A forked child gets its own."""
    return _launcher(os.getpid())


def _remove_at_exit(directory: Path, owner: int) -> None:
    import atexit

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)


def _libraries(binary: str) -> dict[str, str]:
    """The program's shared libraries, as the host's loader finds them: file name to path. Empty for a static program."""
    listed = subprocess.run(
        [binary, "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_TRY_SECONDS,
        env={"LD_TRACE_LOADED_OBJECTS": "1"},
        check=False,
    ).stdout.decode("utf-8", "replace")
    found: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, path = line.strip().rpartition(" (")[0].rpartition("=> ")[::1]
        if path.startswith("/"):
            found[(name or Path(path).name).strip() if name else Path(path).name] = path
    return found
