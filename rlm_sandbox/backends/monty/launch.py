"""Starting workers confined: the script the engine executes in place of its program, and whether this kernel allows it."""

from __future__ import annotations

import atexit
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic_monty._binary import find_monty_binary

__all__ = ("Launcher", "confined_launcher")

_PACKAGE: Final = Path(__file__).parents[2]
_TRY_SECONDS: Final = 20.0
#: <linux/memfd.h>, from 6.3 on: a host may have made memory files not executable unless this is said.
_MFD_EXEC: Final = 0x10
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
    reason = ""
    for write in (_in_memory, _in_a_directory):
        try:
            script = _script(write, parent)
            tried = subprocess.run(
                [script, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRY_SECONDS, env={}, check=False
            )
        except (OSError, subprocess.SubprocessError) as exc:
            reason = reason or type(exc).__name__
            continue
        if tried.returncode == 0:
            return Launcher(script)
        reason = tried.stderr[:300].decode("utf-8", "replace").strip() or f"exit status {tried.returncode}"
    return Launcher(None, f"its workers cannot be confined by the kernel here ({reason})", _REMEDY)


def confined_launcher() -> Launcher:
    """The launcher for workers of this process, tried once. A forked child gets its own."""
    return _launcher(os.getpid())


def _script(write: Callable[[str, str], str], parent: int) -> str:
    """Write what the engine is to execute; returns its path."""
    binary = os.path.realpath(find_monty_binary())
    program = write("program", _PROGRAM.format(package=str(_PACKAGE), binary=binary, libraries=_libraries(binary), parent=parent))
    python = shlex.quote(sys.executable)
    return write(
        "worker",
        # Only the trial's complaints are read: a worker that is started while the host ends has nobody to tell.
        f'#!/bin/sh\n[ "$1" = --version ] || exec 2>/dev/null\nexec {python} -I -S -X utf8 {shlex.quote(program)} "$@"\n',
    )


def _in_memory(name: str, text: str) -> str:
    """A memory file, which goes with this process however that ends. By way of /proc, which not every process can be seen in."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this Python knows no memory files")
    try:
        fd = os.memfd_create(f"rlm-{name}", os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:  # before Linux 6.3
        fd = os.memfd_create(f"rlm-{name}", os.MFD_CLOEXEC)
    with open(fd, "w", encoding="utf-8", closefd=False) as file:
        file.write(text)
    os.fchmod(fd, 0o700)
    return f"/proc/{os.getpid()}/fd/{fd}"


def _in_a_directory(name: str, text: str) -> str:
    """A file in a directory of this process, which is removed when it ends; if it is killed, the directory is left behind."""
    path = _directory(os.getpid()) / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o700)
    return str(path)


@functools.cache
def _directory(owner: int) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="rlm-sandbox-"))

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    return directory


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
