"""Which release of the engine this backend is written for. Looked at before anything of the engine is imported."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from ...errors import BackendUnavailable

__all__ = ("ENGINE_REMEDY", "check_engine")

_PACKAGE: Final = "wasmtime"
#: Parts of it are private and may change in any other (`_capi_unsafe`).
_RELEASE: Final = "50.0"
ENGINE_REMEDY: Final = f"run: pip install '{_PACKAGE}=={_RELEASE}.1'"


@cache  # it is asked for with every session, and looking takes a millisecond
def check_engine() -> str:
    """The installed version.

    Raises:
        BackendUnavailable: it is missing, of another release, or has no library for this machine.
    """
    try:
        found = version(_PACKAGE)
    except PackageNotFoundError:
        raise BackendUnavailable("wasm", f"the package {_PACKAGE} is not installed", ENGINE_REMEDY) from None
    if not found.startswith(f"{_RELEASE}."):
        reason = f"{_PACKAGE} {found} is installed, and this backend is written for {_RELEASE}"
        raise BackendUnavailable("wasm", reason, ENGINE_REMEDY)
    try:
        importlib.import_module(_PACKAGE)
    except Exception as exc:  # noqa: BLE001 - a library that does not load says so in its own way
        reason = f"{_PACKAGE} {found} cannot be loaded ({type(exc).__name__}: {str(exc)[:200]})"
        raise BackendUnavailable("wasm", reason, "use a 64-bit Linux, macOS or Windows, or another backend") from None
    return found
