"""Copies of Python code for guests that say nothing of the host: no path of it in bytecode, text or machine code.

Bytecode names the file it was compiled from, and an interpreter and its configuration the place they were built for; a guest
may read both. So a guest gets a copy: bytecode is compiled anew under the guest's path, and the host's prefix is replaced by a
path of the same length everywhere else. A copy is made once and kept in the user's cache, with a digest of all its contents
beside it, which is checked before it is used.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from ...confine import _syscalls_unsafe as raw
from ...errors import BackendUnavailable
from ...usercache import CacheUnusable, exclusive, private_directory

__all__ = ("compile_tree", "copy_neutral", "needed_libraries", "only_here", "prefixes", "stored")

#: Part of every key: a copy made by other code is not used.
_FORMAT: Final = "2"
_COMPILE_SECONDS: Final = 300
#: A copy nobody used for this long goes when another one is made.
_KEEP_SECONDS: Final = 30 * 86_400
_NEVER_COMPILED: Final = r"/(tests?|testing/tests|idlelib|lib2to3/tests)/"


def stored(kind: str, description: str, make: Callable[[Path], None]) -> Path:
    """The directory of a copy, made by ``make`` if there is none. Two hosts that want the same one make it once.

    Args:
        kind: first part of its name.
        description: everything its content depends on.
        make: fills the directory that it is given.

    Raises:
        BackendUnavailable: there is no cache directory that can be used.
    """
    try:
        root = private_directory("jail")
    except CacheUnusable as exc:
        raise BackendUnavailable("jail", str(exc), exc.remedy) from None
    key = hashlib.sha256(f"{_FORMAT}\n{sys.version}\n{description}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    target = root / f"{kind}-{key}"
    record = root / f"{kind}-{key}.digest"
    try:
        if _is_whole(target, record):
            return target
        with exclusive(root / f"{kind}.lock"):
            if not _is_whole(target, record):  # another process made it meanwhile
                _remove_old(root, kind)
                _make(target, record, make)
    except OSError as exc:
        reason = f"its copy of Python code cannot be made in the cache ({exc.strerror or exc})"
        raise BackendUnavailable(
            "jail", reason, "free some disk space, or set RLM_SANDBOX_CACHE to a directory that has it"
        ) from exc
    return target


def only_here(kind: str, make: Callable[[Path], None]) -> Path:
    """A copy for this process alone, which goes with it: where there is no cache.

    Raises:
        BackendUnavailable: there is no room for it.
    """
    directory = Path(tempfile.mkdtemp(prefix=f"rlm-sandbox-{kind}-"))
    atexit.register(_remove, directory, os.getpid())
    inner = directory / "copy"
    try:
        inner.mkdir()
        make(inner)
    except OSError as exc:
        raise BackendUnavailable("jail", f"its copy of Python cannot be made ({exc})", "free some disk space") from exc
    return inner


def _remove(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # and no child of it that was forked
        shutil.rmtree(directory, ignore_errors=True)


def _make(target: Path, record: Path, make: Callable[[Path], None]) -> None:
    record.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        make(new)
        new.chmod(0o755)  # a guest of a root host is somebody else; the directory above is closed
        new.replace(target)
        record.write_text(_digest(target))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _is_whole(target: Path, record: Path) -> bool:
    try:
        expected = record.read_text()
        os.utime(record)
        return expected == _digest(target)
    except OSError:
        return False


def _remove_old(root: Path, kind: str) -> None:
    for record in root.glob(f"{kind}-*.digest"):
        if record.stat().st_mtime < time.time() - _KEEP_SECONDS:
            shutil.rmtree(record.with_suffix(""), ignore_errors=True)
            record.unlink(missing_ok=True)


def _digest(directory: Path) -> str:
    """Names, modes and contents of everything below a directory."""
    total = hashlib.sha256()
    for base, directories, names in os.walk(directory):
        directories.sort()
        for name in sorted(names):
            path = os.path.join(base, name)  # noqa: PTH118 - 3,000 files before each first session
            with open(path, "rb", opener=_open_own) as file:
                content = hashlib.file_digest(file, "sha256").digest()
                mode = os.fstat(file.fileno()).st_mode
            total.update(f"{os.path.relpath(path, directory)}\0{mode:o}\0".encode("utf-8", "surrogateescape") + content)
    return total.hexdigest()


def _open_own(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def prefixes() -> list[bytes]:
    """Paths of the host that its Python was built or set up with, longest first."""
    found = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    found |= {os.path.realpath(path) for path in found}
    return sorted((os.fsencode(path) for path in found if len(str(Path(path).parent)) >= len("/usr")), key=len, reverse=True)


def _neutral(prefix: bytes, *, machine_code: bool) -> bytes:
    """A path as long as ``prefix`` that means /usr: nothing moves where it is replaced.

    In machine code the last component stays, below that path: linkers keep one copy of strings that end alike, and the version of
    a Python in ``versions/3.11.7`` may be nothing but the end of its prefix.
    """
    kept = prefix[prefix.rindex(b"/") :] if machine_code else b""
    return b"/" * (len(prefix) - len(kept) - 3) + b"usr" + kept


def copy_neutral(files: Iterable[tuple[Path, Path]]) -> None:
    """Copy files (from, to) without the host's prefix in them, readable for all. What a link names is copied in its place."""
    found = prefixes()
    for source, target in files:
        data = source.read_bytes()
        machine_code = data.startswith(b"\x7fELF")
        for prefix in found:
            if prefix in data:
                neutral = _neutral(prefix, machine_code=machine_code)
                # Only as a path: /opt/py is not the beginning of /opt/pypy.
                data = re.sub(re.escape(prefix) + rb"(?![A-Za-z0-9_.-])", neutral, data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def compile_tree(directory: Path, guest_path: str) -> None:
    """Compile what is below ``directory`` as if it lay at ``guest_path``. A file that is no Python is left as it is."""
    command = [
        os.path.realpath(sys.executable), "-I", "-S", "-m", "compileall", "-qq", "-j", "2", "--invalidation-mode", "unchecked-hash",
        "-x", _NEVER_COMPILED, "-s", str(directory), "-p", guest_path, str(directory),
    ]  # fmt: skip
    env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    try:
        subprocess.run(
            command, env=env, check=False, timeout=_COMPILE_SECONDS, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pass  # what is not compiled is compiled when it is imported


def needed_libraries(directory: Path) -> dict[str, Path]:
    """Shared libraries outside ``directory`` that the extension modules below it are linked to. None of their code runs."""
    loader = next((path for path in raw.loaded_libraries() if Path(path).name.startswith(("ld-linux", "ld64"))), None)
    if loader is None:
        return {}
    found: dict[str, Path] = {}
    for path in sorted(directory.rglob("*.so*")):
        listed = subprocess.run([loader, "--list", str(path)], env={}, capture_output=True, check=False, timeout=30)
        for name, where in re.findall(rb"(\S+) => (/.*) \(0x[0-9a-f]+\)", listed.stdout):
            library = Path(os.fsdecode(where))
            if not library.is_relative_to(directory):
                found[os.fsdecode(name)] = library
    return found
