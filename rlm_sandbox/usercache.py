"""A directory of the user's own for what is made once per machine. What is in it runs, so nothing foreign may get in."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ("CACHE_VARIABLE", "CacheUnusable", "exclusive", "private_directory")

#: Names a directory to use in place of the user's cache.
CACHE_VARIABLE: Final = "RLM_SANDBOX_CACHE"


class CacheUnusable(Exception):
    """There is no directory that only this user may write. The text says why; ``remedy`` what to do."""

    def __init__(self, reason: str, remedy: str = f"set {CACHE_VARIABLE} to a directory of your own") -> None:
        super().__init__(reason)
        self.remedy = remedy


def _default_directory() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rlm-sandbox"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "rlm-sandbox"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlm-sandbox"


def private_directory(name: str) -> Path:
    """The directory ``name`` of the user's cache, made and checked: the user's own, and closed to everybody else.

    Raises:
        CacheUnusable: it cannot be made, or is open to others.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    try:
        directory = (Path(chosen) if chosen else _default_directory()) / name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except (OSError, RuntimeError) as exc:
        raise CacheUnusable(f"there is no cache directory ({getattr(exc, 'strerror', None) or exc})") from None
    if hasattr(os, "geteuid"):
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise CacheUnusable(f"the cache directory {str(directory)!r} belongs to somebody else")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise CacheUnusable(f"the cache directory {str(directory)!r} is open to others", f"run: chmod 700 {str(directory)!r}")
    return directory


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the system has such locks: two that make the same thing do the work once."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
