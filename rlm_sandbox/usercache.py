"""A directory of the user's own for what is made once per machine. What is in it runs, so nothing foreign may get in.

It belongs to the user and is closed to everybody else, and nobody else can put another in its place, which the directories
above it decide. What is in it is checked again, by whoever uses it, before it is used.
"""

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
_REMEDY: Final = f"set {CACHE_VARIABLE} to a directory of your own with 200 MB to spare"


class CacheUnusable(Exception):
    """There is no directory that only this user may write. The text says why; ``remedy`` what to do."""

    def __init__(self, reason: str, remedy: str = _REMEDY) -> None:
        super().__init__(reason)
        self.remedy = remedy


def _default_directory() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rlm-sandbox"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "rlm-sandbox"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlm-sandbox"


def private_directory(name: str, chosen: Path | None = None) -> Path:
    """The directory ``name`` of the user's cache, or of ``chosen``, made and checked.

    Raises:
        CacheUnusable: it cannot be made, or others can change it or put another in its place.
    """
    named = chosen or (Path(os.environ[CACHE_VARIABLE]) if os.environ.get(CACHE_VARIABLE) else None)
    try:
        directory = (named or _default_directory()) / name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "geteuid"):
            directory = directory.parent.resolve() / directory.name  # what is checked is what is used: no link is left in it
            _check_own(directory)
            for above in directory.parents:
                _check_above(above)
    except (OSError, RuntimeError) as exc:
        raise CacheUnusable(f"there is no cache directory ({getattr(exc, 'strerror', None) or exc})") from None
    return directory


def _check_own(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise CacheUnusable(f"the cache directory {str(directory)!r} belongs to somebody else")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise CacheUnusable(f"the cache directory {str(directory)!r} is open to others", f"run: chmod 700 {str(directory)!r}")


def _check_above(directory: Path) -> None:
    """Whoever may rename what is in it could have other code used than what was checked."""
    found = directory.lstat()
    # Where root is not mapped into this user namespace, what is root's looks like what is the root directory's owner's.
    trusted = found.st_uid in (0, os.geteuid(), directory.joinpath("/").lstat().st_uid)
    open_to_others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid))
    if not trusted or (open_to_others and not found.st_mode & stat.S_ISVTX):
        raise CacheUnusable(
            f"{str(directory)!r}, above the cache directory, can be changed by others", f"run: chmod go-w, or {_REMEDY}"
        )


def _is_private_group(gid: int) -> bool:
    """Whether a group is the user's alone, as many systems make one for each user: those have home directories it may write."""
    if gid == 0:
        return True  # root's own
    try:
        import grp
        import pwd

        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except (ImportError, KeyError):
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the system has such locks: two that make the same thing do the work once.

    Raises:
        OSError: the file cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
