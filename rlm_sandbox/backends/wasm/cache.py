"""The user's cache of compiled guests. What is in it is native code that runs as the user: nothing foreign may get in.

Each entry has a record of its digest beside it. An entry that is damaged, or not the user's own, is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wasmtime import Engine, WasmtimeError
from wasmtime.component import Component

from ...errors import BackendUnavailable
from ...usercache import CACHE_VARIABLE, CacheUnusable, exclusive, private_directory
from .progress import progress

if TYPE_CHECKING:
    from .component import GuestComponent

__all__ = ("cache_directory", "compiled_file", "entry_path", "is_old", "making", "read_private")

_REMEDY: Final = f"set {CACHE_VARIABLE} to a directory of your own with 200 MB to spare"
_ENGINE: Final = version("wasmtime")
#: Compiled guests of older versions that are kept, and for how long all of them are: several checkouts may share a cache.
_KEEP: Final = 4
_RECENT_SECONDS: Final = 24 * 3600.0


def cache_directory(chosen: Path | None) -> Path:
    """The directory, made and checked.

    Raises:
        BackendUnavailable: it cannot be made or written, or others can change it or put another in its place.
    """
    try:
        return private_directory("wasm", chosen)
    except CacheUnusable as exc:
        raise BackendUnavailable("wasm", str(exc), exc.remedy) from None


def read_private(path: Path) -> bytes:
    """A file that is the user's own. Raises OSError if it is not."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or (
            hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022)
        ):
            raise PermissionError("not a file of this user's own")
        return file.read()


def entry_path(source: GuestComponent, configuration: str, chosen: Path | None) -> Path:
    """Where the compiled code of a component is, if it is there. Raises as `cache_directory`."""
    machine = f"{sys.platform} {platform.machine()}"  # a home directory may be seen by several
    key = hashlib.sha256(f"{_ENGINE}\n{configuration}\n{machine}\n{source.digest}".encode()).hexdigest()[:24]
    return cache_directory(chosen) / f"guest-{key}.cwasm"


def compiled_file(engine: Engine, source: GuestComponent, configuration: str, chosen: Path | None) -> Component:
    """The component as native code: from the cache, or compiled into it.

    Raises:
        BackendUnavailable: the cache cannot be used.
    """
    path = entry_path(source, configuration, chosen)
    found = _read_entry(engine, path)
    if found is not None:
        return found
    with making(path.with_suffix(".lock")):
        found = _read_entry(engine, path)  # another process made it meanwhile
        if found is not None:
            return found
        _check_writable(path.parent)  # before seconds are spent
        with progress("compiling the wasm guest for this machine, once"):
            component = Component(engine, source.data)
        _write_entry(path, bytes(component.serialize()))
        found = _read_entry(engine, path)
        _drop_old(path)
    # The file's pages are shared by every process that maps them; what was compiled here is this process's alone.
    return found or component


@contextmanager
def making(lock: Path) -> Iterator[None]:
    """One process at a time. Raises `BackendUnavailable` if the cache cannot be written."""
    with _write_errors(lock.parent), exclusive(lock):
        yield


def _read_entry(engine: Engine, path: Path) -> Component | None:
    try:
        recorded = json.loads(read_private(path.with_suffix(".json")))["digest"]
        if hashlib.sha256(read_private(path)).hexdigest() != recorded:
            return None
        return Component.deserialize_file(engine, str(path))
    except (OSError, ValueError, KeyError, TypeError, WasmtimeError):
        return None


def _check_writable(directory: Path) -> None:
    with _write_errors(directory):
        tempfile.TemporaryFile(dir=directory).close()


@contextmanager
def _write_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise BackendUnavailable(
            "wasm", f"the cache directory {str(directory)!r} cannot be written ({exc.strerror})", _REMEDY
        ) from None


def _write_entry(path: Path, code: bytes) -> None:
    record = json.dumps({"digest": hashlib.sha256(code).hexdigest(), "wasmtime": _ENGINE}).encode()
    with _write_errors(path.parent):
        for target, data in ((path, code), (path.with_suffix(".json"), record)):
            fd, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                Path(name).replace(target)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise


def is_old(path: Path) -> bool:
    """Whether an entry was made long enough ago that nobody may be about to use it again."""
    return time.time() - path.stat().st_mtime > _RECENT_SECONDS


def _drop_old(kept: Path) -> None:
    """Compiled guests of versions nobody uses any more would pile up at 50 MB each."""
    try:
        entries = sorted(kept.parent.glob("guest-*.cwasm"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in entries[_KEEP:]:
            if path != kept and is_old(path):
                for suffix in (".cwasm", ".json", ".lock"):
                    path.with_suffix(suffix).unlink(missing_ok=True)
    except OSError:
        return
