"""The guest's own Python: interpreter and standard library as a copy that does not say where the host keeps them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ... import bundle
from ...confine.places import GUEST_STDLIB
from ...errors import BackendUnavailable
from .store import compile_tree, copy_neutral, only_here, prefixes, stored

__all__ = ("guest_library",)

#: Left out: what the host installed, and what a guest cannot use.
_ABSENT: Final = ("site-packages", "dist-packages")
_NOT_HERE: Final = ("ensurepip", "test", "idlelib", "tkinter", "turtledemo")
_SAYS_SO: Final = 'raise ModuleNotFoundError(f"{__name__} is not part of the sandbox", name=__name__)\n'
_LEFT_OUT: Final = re.compile(r"config-\d.*|__pycache__|.*\.a|sitecustomize\.py|EXTERNALLY-MANAGED")
_LIST_SECONDS: Final = 30


def guest_library() -> Path:
    """A directory with ``python``, ``stdlib`` and ``lib`` (shared libraries that belong to this Python), made once per machine.
    Where there is no cache directory it is made for this process alone, without bytecode.

    Raises:
        BackendUnavailable: it cannot be made.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = list(_files(stdlib))
    described: list[str] = []
    for path in (Path(os.path.realpath(sys.executable)), *files):
        status = path.stat()
        described.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    description = "\n".join(described)

    def make(directory: Path, *, compiled: bool = True) -> None:
        target = directory / "stdlib"
        copy_neutral((path, target / path.relative_to(stdlib)) for path in files)
        _forget_home(target)
        for name in _NOT_HERE:
            (target / name).mkdir(mode=0o755)
            (target / name / "__init__.py").write_text(_SAYS_SO)
        copy_neutral([(Path(os.path.realpath(sys.executable)), directory / "python")])
        (directory / "lib").mkdir(mode=0o755)
        copy_neutral((path, directory / "lib" / name) for name, path in _own_libraries().items())
        if compiled:
            compile_tree(target, GUEST_STDLIB)

    try:
        return stored("python", description, make)
    except BackendUnavailable:
        return only_here("python", lambda directory: make(directory, compiled=False))


def _files(stdlib: Path) -> Iterator[Path]:
    for base, directories, names in os.walk(stdlib):
        top = Path(base) == stdlib
        directories[:] = sorted(
            name
            for name in directories
            if not _LEFT_OUT.fullmatch(name) and not (top and name in (*_ABSENT, *_NOT_HERE)) and name not in ("tests", "test")
        )
        for name in sorted(names):
            path = Path(base, name)
            if not _LEFT_OUT.fullmatch(name) and path.is_file():
                yield path


def _forget_home(stdlib: Path) -> None:
    """The record of how this Python was built may name its builder's home directory beside the prefix."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises where there is none
    if len(Path(home).parts) < 2:
        return
    for path in stdlib.glob("_sysconfigdata*.py"):
        path.write_bytes(path.read_bytes().replace(os.fsencode(home), b"/" * (len(os.fsencode(home)) - 3) + b"usr"))


def _own_libraries() -> dict[str, Path]:
    """Shared libraries of this Python that lie below its prefix. The system's own are used where they are."""
    archive = os.memfd_create("rlm-guest", os.MFD_CLOEXEC)
    try:
        os.write(archive, bundle.guest_archive())
        done = subprocess.run(
            [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", f"/proc/self/fd/{archive}", "libraries"],
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            pass_fds=(archive,), stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_LIST_SECONDS,
        )  # fmt: skip
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as exc:
        raise OSError(f"the libraries of this interpreter cannot be listed: {exc}") from exc
    finally:
        os.close(archive)
    below = [os.fsdecode(prefix) for prefix in prefixes()]
    return {name: Path(path) for name, path in found.items() if any(Path(path).is_relative_to(prefix) for prefix in below)}
