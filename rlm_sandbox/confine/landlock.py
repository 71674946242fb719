"""Landlock: what a session may do with files, by path, beside what its tree and mounts allow. Where the kernel has it.

It closes what a read-only mount leaves open: opening a pipe or a device of an input directory for writing. And it stands where
a mistake in the tree would not: everything that is not listed is refused, network and signals to other sessions included.
"""

from __future__ import annotations

import os
from typing import Final

from . import _syscalls_unsafe as raw
from .places import GUEST_INPUT

__all__ = ("RULES", "abi", "confine_files")

_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_REMOVE_DIR: Final = 1 << 4
_REMOVE_FILE: Final = 1 << 5
_MAKE_CHAR: Final = 1 << 6
_MAKE_DIR: Final = 1 << 7
_MAKE_REG: Final = 1 << 8
_MAKE_SOCK: Final = 1 << 9
_MAKE_FIFO: Final = 1 << 10
_MAKE_BLOCK: Final = 1 << 11
_MAKE_SYM: Final = 1 << 12
#: Since version 2: without it, a file may not be renamed from one directory to another.
_REFER: Final = 1 << 13
#: Since version 3.
_TRUNCATE: Final = 1 << 14
_FIRST: Final = (1 << 13) - 1
_BIND_AND_CONNECT_TCP: Final = 3
#: Since version 6: no abstract unix socket and no signal beyond the session.
_SCOPES: Final = 3

_READ: Final = _READ_FILE | _READ_DIR
#: Nothing may be executed anywhere, and nothing but files, directories and links be made.
RULES: Final[tuple[tuple[str, int], ...]] = (
    ("/", _READ_DIR),
    ("/usr", _READ),
    (GUEST_INPUT, _READ),
    ("/dev/null", _READ_FILE | _WRITE_FILE | _TRUNCATE),
    ("/dev/random", _READ_FILE),
    ("/dev/urandom", _READ_FILE),
    (
        "/tmp",  # noqa: S108
        _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE,
    ),
)


def abi() -> int:
    """The version of Landlock that this kernel has in force; 0 if none."""
    try:
        return raw.landlock_abi()
    except OSError:
        return 0


def confine_files(version: int) -> None:
    """Restrict this process, and what comes of it, to `RULES`. ``no_new_privs`` must be set.

    Raises:
        OSError: the kernel refuses.
    """
    handled = _FIRST | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    network = _BIND_AND_CONNECT_TCP if version >= 4 else None
    ruleset = raw.landlock_ruleset(handled, network, _SCOPES if version >= 6 else None)
    try:
        for path, rights in RULES:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                raw.landlock_allow(ruleset, fd, rights & handled)
            finally:
                os.close(fd)
        raw.landlock_restrict(ruleset)
    finally:
        os.close(ruleset)
