"""Runs in the build stage: collect what a session needs into one directory, which becomes the whole image.

The interpreter, its standard library, the shared libraries they load, the guest archive unpacked and compiled, the
packages of a variant, what a start imports of all that once more in one file, the records of the Debian packages that these
files came from (so that scanners know them), and a few directories. No shell, no package manager, no interpreter but this one.
Every file gets the same time, so that the same inputs give the same image.

    python3 -I collect.py GUEST_DIGEST TARGET
"""

from __future__ import annotations

import compileall
import ctypes
import hashlib
import importlib.util
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
#: Parts of the standard library that no session can use, or that start programs: tests, installers, windows.
LEFT_OUT = {
    "test", "tests", "idlelib", "ensurepip", "turtledemo", "tkinter", "lib2to3", "__pycache__", "site-packages", "dist-packages",
}  # fmt: skip
#: 1980-01-01, the oldest time that every archive format can hold.
TIME = 315532800
GUEST = "usr/lib/rlm_guest"
PACKAGES = "usr/lib/rlm_packages"


def copy(path: str, target: Path, wanted: set[str]) -> None:
    """A file and the links on the way to it."""
    if path in wanted:
        return
    parent = os.path.dirname(path)
    real_parent = os.path.realpath(parent)
    if real_parent != parent:  # /lib is a link to usr/lib: make the link, copy the file where it is
        top = next(str(part) for part in reversed([*Path(path).parents]) if os.path.islink(part))
        wanted.add(top)
        link = target / top.lstrip("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.readlink(top))
        copy(os.path.join(real_parent, os.path.basename(path)), target, wanted)
        return
    wanted.add(path)
    place = target / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(path):
        place.symlink_to(os.readlink(path))
        copy(os.path.normpath(os.path.join(parent, os.readlink(path))), target, wanted)
    else:
        shutil.copyfile(path, place)
        runs = ".so" in os.path.basename(path) or path == os.path.realpath(sys.executable)
        place.chmod(0o755 if runs else 0o644)


def standard_library() -> list[str]:
    found = []
    for name in ("stdlib", "platstdlib"):
        for folder, folders, files in os.walk(sysconfig.get_path(name)):
            folders[:] = sorted(entry for entry in folders if entry not in LEFT_OUT and not entry.startswith("config-"))
            found += [os.path.join(folder, file) for file in sorted(files) if not file.endswith((".pyc", ".a"))]
    return sorted(set(found))


def libraries(extensions: list[str]) -> list[str]:
    """The shared libraries that are mapped once every extension module has been loaded, and the loader."""
    for path in extensions:
        try:
            ctypes.CDLL(path)
        except OSError:
            pass  # its library is not installed, so it does not work in the base image either
    with open("/proc/self/maps") as file:
        mapped = {line.split(maxsplit=5)[5].strip() for line in file if len(line.split(maxsplit=5)) == 6}
    found = {path for path in mapped if path.startswith("/") and ".so" in path}
    for folder in {os.path.dirname(path) for path in found} | {"/lib64", "/lib"}:
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            path = os.path.join(folder, name)
            # The names by which the loader looks for them.
            if ".so" in name and os.path.islink(path) and os.path.realpath(path) in found:
                found.add(path)
    loader = re.search(rb"/lib\S*/ld-\S+\.so\.\d", Path(os.path.realpath(sys.executable)).read_bytes()[: 1 << 16])
    if loader:
        found.add(loader[0].decode())
    return sorted(found)


def debian_records(target: Path, wanted: set[str]) -> None:
    """The status and file lists of the packages that own what was copied."""
    info, status = Path("/var/lib/dpkg/info"), Path("/var/lib/dpkg/status")
    if not status.exists():
        return
    owners = set()
    real = {os.path.realpath(path) for path in wanted}
    for listing in sorted(info.glob("*.list")):
        if any(os.path.realpath(line) in real and os.path.isfile(line) for line in listing.read_text().splitlines()):
            owners.add(listing.stem.partition(":")[0])
    kept = [block for block in status.read_text().split("\n\n") if block.partition("\n")[0].removeprefix("Package: ") in owners]
    place = target / "var/lib/dpkg/status"
    place.parent.mkdir(parents=True)
    place.write_text("\n\n".join(kept) + "\n")
    for name in ("etc/os-release", "usr/lib/os-release"):
        if os.path.isfile(f"/{name}"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f"/{name}", target / name)


def main() -> None:
    digest, target = sys.argv[1], Path(sys.argv[2])
    archive = HERE / "rlm_guest.zip"
    if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
        sys.exit("the guest archive is not the one that was asked for")
    if sys.version_info < (3, 11):
        sys.exit(f"the base image has Python {sys.version.split()[0]}; sessions need 3.11 or newer")
    wanted: set[str] = set()
    interpreter = os.path.realpath(sys.executable)
    library = standard_library()
    packages = sorted(path for wheel in (HERE / "wheels").glob("*.whl") for path in unpacked(wheel, target / PACKAGES))
    extensions = [path for path in [*library, *packages] if ".so" in os.path.basename(path)]
    for path in [interpreter, *library, *(path for path in libraries(extensions) if str(target) not in path)]:
        copy(path, target, wanted)
    for folder, _, files in os.walk("/usr/share/zoneinfo"):
        for name in sorted(files):
            copy(os.path.join(folder, name), target, wanted)
    debian_records(target, wanted)
    zipfile.ZipFile(archive).extractall(target / GUEST)
    (target / "usr/lib/rlm_python").symlink_to(interpreter)
    (target / "ctx").mkdir(mode=0o711)
    (target / "tmp").mkdir()
    (target / "etc").mkdir(exist_ok=True)
    (target / "etc/passwd").write_text("nobody:x:65534:65534:nobody:/nonexistent:/nonexistent\n")
    (target / "etc/group").write_text("nogroup:x:65534:\n")
    # Bytecode is bound to its source by hash and never checked at run time: a start compiles nothing and the image is read-only.
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for folder in (GUEST, PACKAGES, sysconfig.get_path("stdlib").lstrip("/")):
        compileall.compile_dir(target / folder, quiet=2, stripdir=str(target), invalidation_mode=mode, workers=1)
    write_start_modules(target)
    for folder, folders, files in os.walk(target, topdown=False):
        for name in [*folders, *files]:
            os.utime(os.path.join(folder, name), (TIME, TIME), follow_symlinks=False)
    os.utime(target, (TIME, TIME))


def write_start_modules(target: Path) -> None:
    """The bytecode of what a session's start imports, in one file; runners/start_modules.py of the guest says how and why."""
    guest = target / GUEST
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(guest), "modules", str(target / PACKAGES)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    index, content = [], bytearray()
    for line in found.splitlines():
        name, origin, package = line.split("\t")
        path = f"/{origin.removeprefix(str(target)).lstrip('/')}"
        code = b""
        if path.endswith(".py"):
            code = Path(importlib.util.cache_from_source(f"{target}{path}")).read_bytes()
        index.append(f"{name}\t{path}\t{package}\t{len(content)}\t{len(code)}\n")
        content += code
    (guest / "start_modules").write_bytes("".join(index).encode() + b"\n" + content)


def unpacked(wheel: Path, target: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and "/tests/" not in name]
        archive.extractall(target, names)
    return [str(target / name) for name in names]


if __name__ == "__main__":
    main()
