"""The guest archive: the guest-side files as one reproducible zip that any Python from 3.11 on runs.

Same sources, same bytes: entries sorted, with a fixed time and mode. Its digest names what runs in a guest.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from importlib import resources
from typing import Final

__all__ = ("PACKAGE", "digest", "guest_archive")

#: The package's name inside a guest.
PACKAGE: Final = "rlm_guest"
_DIRECTORIES: Final = ("confine", "runners", "wire")
_CONTEXT: Final = ("backing.py", "stored.py", "view.py")
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)


def _sources() -> dict[str, bytes]:
    root = resources.files(__package__)
    files = {f"{PACKAGE}/__init__.py": b"", f"{PACKAGE}/context/__init__.py": b""}
    for directory in _DIRECTORIES:
        for entry in (root / directory).iterdir():
            if entry.name.endswith(".py") and entry.name != "archive_main.py":
                files[f"{PACKAGE}/{directory}/{entry.name}"] = entry.read_bytes()
    for name in _CONTEXT:
        files[f"{PACKAGE}/context/{name}"] = (root / "context" / name).read_bytes()
    files["__main__.py"] = (root / "runners" / "archive_main.py").read_bytes()
    return files


@functools.cache
def guest_archive() -> bytes:
    """The archive's bytes. Stored, not compressed: it is read once per launch, from memory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(_sources().items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o100444 << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def digest() -> str:
    """SHA-256 of the archive, in hex."""
    return hashlib.sha256(guest_archive()).hexdigest()
