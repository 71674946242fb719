"""Where the guest component is: in the package, or built from this package's sources into the user's cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...errors import BackendUnavailable
from ...usercache import CACHE_VARIABLE
from . import build
from .cache import cache_directory, is_old, making, read_private
from .progress import progress

__all__ = ("REINSTALL", "GuestComponent", "existing_component", "find_component")

#: Components of other sources that are kept: another branch's, say.
_KEEP: Final = 2
#: Where a wheel carries it.
_PACKAGED: Final = Path(__file__).with_name("guest")
REINSTALL: Final = f"reinstall rlm-sandbox, or run: pip install '{build.TOOL}'"


@dataclass(frozen=True, slots=True)
class GuestComponent:
    """A component whose bytes are those that were recorded when it was built."""

    data: bytes
    digest: str
    packaged: bool


def find_component(cache: Path | None) -> GuestComponent:
    """The component of these sources. Built, once, if the package does not carry it.

    Raises:
        BackendUnavailable: it is damaged; or missing, and the tool that builds it is not installed.
    """
    found = existing_component(cache)
    if found is not None:
        return found
    directory = _built(cache)
    with making(directory.with_name("build.lock")):
        found = _checked(directory, build.sources_digest(), packaged=False)  # another process built it meanwhile
        if found is None:
            if not build.can_build():
                raise BackendUnavailable("wasm", "the guest component is missing from this installation", REINSTALL)
            _build(directory)
            found = _checked(directory, build.sources_digest(), packaged=False)
            _drop_old(directory)
    if found is None:
        raise BackendUnavailable("wasm", "the guest component that was just built cannot be read", REINSTALL)
    return found


def existing_component(cache: Path | None) -> GuestComponent | None:
    """The component of these sources if there is one.

    Raises:
        BackendUnavailable: the package's is damaged, or the cache cannot be used.
    """
    sources = build.sources_digest()
    if (_PACKAGED / build.COMPONENT_NAME).exists():
        found = _checked(_PACKAGED, sources, packaged=True)
        if found is not None:
            return found
    return _checked(_built(cache), sources, packaged=False)


def _built(cache: Path | None) -> Path:
    return cache_directory(cache) / f"component-{build.sources_digest()[:24]}"


def _build(directory: Path) -> None:
    try:
        with progress("building the wasm guest, once"):
            build.build(directory)
    except build.BuildFailed as exc:
        raise BackendUnavailable("wasm", f"the guest component could not be built ({exc})", REINSTALL) from None
    except OSError as exc:
        raise BackendUnavailable(
            "wasm", f"{str(directory)!r} cannot be written ({exc.strerror})", f"set {CACHE_VARIABLE} to a writable directory"
        ) from None


def _drop_old(kept: Path) -> None:
    """Components of sources that are no more would pile up at 30 MB each."""
    others = [path for path in kept.parent.glob("component-*") if path != kept]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[_KEEP:]:
        if is_old(path):
            shutil.rmtree(path, ignore_errors=True)


def _checked(directory: Path, sources: str, *, packaged: bool) -> GuestComponent | None:
    """The component of a directory if it is whole; None if it is missing or older than the sources."""
    try:
        record = json.loads((directory / build.RECORD_NAME).read_bytes())
        if record.get("sources") != sources:
            return None  # an editable install whose guest side was changed since
        data = (directory / build.COMPONENT_NAME).read_bytes() if packaged else read_private(directory / build.COMPONENT_NAME)
    except (OSError, ValueError, AttributeError):
        if packaged:
            raise BackendUnavailable("wasm", "the guest component of this installation is damaged", REINSTALL) from None
        return None
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.get("digest"):
        if packaged:
            raise BackendUnavailable(
                "wasm", "the guest component of this installation is not the one that was recorded when it was built", REINSTALL
            )
        return None
    return GuestComponent(data, digest, packaged)
