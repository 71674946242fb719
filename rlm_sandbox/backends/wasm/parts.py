"""What the backend rests on, looked at one by one for ``rlm-sandbox doctor``. Nothing is built, compiled or left behind."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ...errors import BackendUnavailable
from ...registry import Part
from ...waiting import wait_until
from .engine_version import check_engine

__all__ = ("examine_parts",)

_NO_SESSION: Final = "No session of wasm can be opened."
#: A built guest, its compiled code, and both once more while they are written.
_CACHE_MB: Final = 200
#: What the engine reserves for one guest, its guard pages included.
_RESERVED_BYTES: Final = 6 << 30


def examine_parts() -> Iterator[Part]:
    """Engine, cache, component, compiled code, threads and address space, in the order in which a session needs them."""
    try:
        found = check_engine()
    except BackendUnavailable as exc:
        yield Part(name="engine", works=False, found=exc.reason, consequence=_NO_SESSION, remedy=exc.remedy)
        return
    yield Part(name="engine", works=True, found=f"wasmtime {found}", consequence="It is the release this backend is written for.")
    try:
        yield _cache()
        yield _component()
        yield _compiled()
    except BackendUnavailable as exc:
        yield Part(name="files", works=False, found=exc.reason, consequence=_NO_SESSION, remedy=exc.remedy)
    yield _threads()
    yield _address_space()


def _cache() -> Part:
    from ...usercache import CACHE_VARIABLE
    from .cache import cache_directory

    try:
        directory = cache_directory(None)
    except BackendUnavailable as exc:
        return Part(name="cache", works=False, found=exc.reason, consequence=_NO_SESSION, remedy=exc.remedy)
    free = shutil.disk_usage(directory).free >> 20
    said = f"{_short(directory)}, closed to others, {free} MB free"
    remedy = f"set {CACHE_VARIABLE} to a directory of your own with {_CACHE_MB} MB to spare"
    if not os.access(directory, os.W_OK | os.X_OK):
        without = "Only a guest that is compiled already can be used."
        return Part(name="cache", works=False, found=f"{said}, not writable", consequence=without, remedy=remedy, needed=False)
    if free < _CACHE_MB:
        without = "There may be no room for a compiled guest."
        return Part(name="cache", works=False, found=said, consequence=without, remedy=remedy, needed=False)
    return Part(name="cache", works=True, found=said, consequence="Compiled code is kept, and nobody else can put any there.")


def _component() -> Part:
    from .build import TOOL, can_build
    from .component import REINSTALL, existing_component

    try:
        component = existing_component(None)
    except BackendUnavailable as exc:
        return Part(name="component", works=False, found=exc.reason, consequence=_NO_SESSION, remedy=exc.remedy)
    if component is not None:
        place = "in the package" if component.packaged else "built into the cache"
        said = f"{place}, {len(component.data) >> 20} MB, sha256 {component.digest[:16]}... as recorded"
        return Part(name="component", works=True, found=said, consequence="The guest is the one that was built from these sources.")
    if can_build():
        said = f"not there yet; {TOOL} is installed"
        return Part(name="component", works=True, found=said, consequence="The first session builds it, which takes half a minute.")
    said = "missing, and the tool that builds it is not installed"
    return Part(name="component", works=False, found=said, consequence=_NO_SESSION, remedy=REINSTALL)


def _compiled() -> Part:
    from .cache import entry_path
    from .component import existing_component
    from .engine import CONFIGURATION

    component = existing_component(None)
    path = None if component is None else entry_path(component, CONFIGURATION, None)
    if path is None or not path.exists():
        return Part(
            name="compiled code", works=True, found="not there yet",
            consequence="The first session compiles the guest for this machine, which takes up to half a minute.",
        )  # fmt: skip
    said = f"{path.stat().st_size >> 20} MB, for this engine, configuration and component"
    return Part(name="compiled code", works=True, found=said, consequence="The first session of a process starts in milliseconds.")


def _threads() -> Part:
    from .cell_threads import STACK_BYTES, run_in_cell_thread

    ran = threading.Event()
    size = f"a stack of {STACK_BYTES >> 20} MiB"
    try:
        run_in_cell_thread(ran.set)
    except BackendUnavailable as exc:
        return Part(name="threads", works=False, found=exc.reason, consequence=_NO_SESSION, remedy=exc.remedy)
    if not wait_until(ran.wait, 10):
        return Part(
            name="threads",
            works=False,
            found=f"one with {size} did not run",
            consequence=_NO_SESSION,
            remedy="report this as a bug",
        )
    without = "Whatever a guest does to its stack ends on it, and not on the caller's."
    return Part(name="threads", works=True, found=f"one with {size} ran", consequence=without)


def _address_space() -> Part:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):
        limit = -1
    if limit < 0:
        return Part(name="address space", works=True, found="no limit", consequence="Any number of sessions finds room.")
    said = f"limited to {limit >> 20} MiB; a guest reserves {_RESERVED_BYTES >> 20} and uses little of it"
    without = f"About {limit // _RESERVED_BYTES} guests fit into one process."
    return Part(name="address space", works=False, found=said, consequence=without, remedy="run: ulimit -v unlimited", needed=False)


def _short(path: Path) -> str:
    """A path without the user's name."""
    try:
        return str(Path("~") / path.relative_to(Path.home()))
    except (ValueError, RuntimeError):
        return str(path)
