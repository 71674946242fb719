"""The guest's file tree: a read-only standard library at a neutral path, a few devices, and nothing of the host.

Built once per launcher on a tmpfs, then pivoted into. Everything is a read-only bind mount, so sessions share it.
"""

from __future__ import annotations

import importlib
import os
import sysconfig
from typing import Final

from . import _syscalls_unsafe as raw
from .places import GUEST_ARCHIVE, GUEST_INPUT, GUEST_PACKAGES, GUEST_PYTHON, GUEST_STDLIB

__all__ = ("build", "guest_command", "libraries_found")

_GUEST_LIBRARIES: Final = "/usr/lib/so"

#: Extension modules that bring shared libraries of their own; imported so that the loader names them.
_LIBRARY_BEARERS: Final = (
    "zlib", "_bz2", "_lzma", "_ctypes", "_decimal", "_hashlib", "_ssl", "_sqlite3", "_uuid", "pyexpat", "_elementtree", "_socket",
)  # fmt: skip
#: Not zero: mapped and shared it is memory that no limit counts.
_DEVICES: Final = ("null", "urandom", "random")


def libraries_found() -> dict[str, str]:
    """Shared libraries by the name the loader looks for, with the path they were found at."""
    for name in _LIBRARY_BEARERS:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # this interpreter was built without it, and so is the guest
    dynload = os.path.join(sysconfig.get_path("stdlib"), "lib-dynload")
    found: dict[str, str] = {}
    for path in raw.loaded_libraries():
        if path.startswith("/") and not path.startswith(dynload):
            found[os.path.basename(path)] = os.path.realpath(path)
    # glibc opens it by name when a thread is cancelled.
    libc = next((path for name, path in found.items() if name.startswith("libc.so")), "")
    gcc = os.path.join(os.path.dirname(libc), "libgcc_s.so.1")
    if libc and os.path.exists(gcc):
        found["libgcc_s.so.1"] = os.path.realpath(gcc)
    return found


def _loader(libraries: dict[str, str]) -> str:
    for name in libraries:
        if name.startswith(("ld-linux", "ld64", "ld-musl", "ld.so")):
            return name
    raise OSError("the interpreter is not dynamically linked: its loader was not found")


def guest_command(libraries: dict[str, str], *args: str) -> list[str]:
    """The command that starts the guest's interpreter inside the tree. By way of the loader: no environment is needed."""
    return [
        f"{_GUEST_LIBRARIES}/{_loader(libraries)}", "--library-path", _GUEST_LIBRARIES, GUEST_PYTHON,
        "-I", "-S", "-X", "utf8", GUEST_ARCHIVE, *args,
    ]  # fmt: skip


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "xb"):
            pass
    raw.mount(source, target, "", raw.MS_BIND | raw.MS_REC)


def build(archive: bytes, library: str, packages: str | None = None) -> dict[str, str]:
    """Make the tree the root of this mount namespace, which must be the caller's own. Returns the libraries.

    Args:
        archive: the guest archive.
        library: a directory with ``python``, ``stdlib``, and ``lib``, shared libraries that are used in place of the host's.
        packages: a directory with ``packages``, importable in every session, and ``lib``, the shared libraries that those
            need; None for none.

    Raises:
        OSError: the kernel refuses a step.
    """
    libraries = libraries_found()
    for directory, replace in ((library, True), (packages, False)):
        if directory is not None:
            found = {name: f"{directory}/lib/{name}" for name in os.listdir(f"{directory}/lib")}
            libraries = {**libraries, **found} if replace else {**found, **libraries}
    os.umask(0o022)
    raw.mount("none", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    root = "/tmp"  # noqa: S108 - any directory that exists everywhere: it is only a mount point in our own namespace
    # The sources may lie below the mount point: reach them through descriptors opened before it is covered.
    sources: dict[str, int] = {}

    def opened(path: str) -> str:
        if path not in sources:
            sources[path] = os.open(path, os.O_PATH | os.O_CLOEXEC)
        return f"/proc/self/fd/{sources[path]}"

    wanted = {GUEST_PYTHON: f"{library}/python", GUEST_STDLIB: f"{library}/stdlib"}
    wanted.update({f"{_GUEST_LIBRARIES}/{name}": path for name, path in libraries.items()})
    wanted.update({f"/dev/{name}": f"/dev/{name}" for name in _DEVICES})
    if packages is not None:
        wanted[GUEST_PACKAGES] = f"{packages}/packages"
    if os.path.isdir("/usr/share/zoneinfo"):
        wanted["/usr/share/zoneinfo"] = "/usr/share/zoneinfo"
    via = {target: opened(source) for target, source in wanted.items()}
    raw.mount("tmpfs", root, "tmpfs", raw.MS_NOSUID | raw.MS_NODEV, "size=4m,mode=0755")
    for name in ("tmp", "dev", "usr/lib", GUEST_INPUT[1:]):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    with open(f"{root}{GUEST_ARCHIVE}", "xb") as file:
        file.write(archive)
    for target, source in via.items():
        _bind(source, f"{root}{target}")
    for fd in sources.values():
        os.close(fd)
    os.chdir(root)
    raw.pivot_root(".", ".")
    raw.umount(".", raw.MNT_DETACH)
    os.chdir("/")
    raw.make_read_only("/", recursive=True)
    return libraries
