"""``RestrictedOptions(process=True)``: the same policy in a killable guest process, by way of the registry.

The guest is opened as an ordinary session whose ``setup`` brings the policy along as sources. What is enforced is enforced by
that guest's own backend, from outside; the policy only decides what cells may write.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from types import TracebackType
from typing import Final, Self

from ...errors import BackendUnavailable
from ...limits import Limits
from ...protocol import Capabilities, REPLProtocol
from ...registry import Backend, SessionConfig, load_backend

__all__ = ("ProcessSession", "inner_backend", "open_process")

#: Backends whose guest is our runner, best first.
_INNER: Final = ("jail",)
_POLICY: Final = ("__init__", "transformer", "guards", "names", "modules", "runtime")
#: What the policy needs of RestrictedPython: its list of known syntax.
_RESTRICTED_PYTHON: Final = ("_types", "transformer")
_MAX_BYTES: Final = 1 << 30


def inner_backend() -> Backend:
    """The backend whose guest runs the policy.

    Raises:
        BackendUnavailable: none works here.
    """
    reasons = []
    for name in _INNER:
        backend = load_backend(name)
        found = backend.probe()
        if found.usable:
            return backend
        reasons.append(f"{name}: {found.reason} ({found.remedy})")
    raise BackendUnavailable(
        "restricted", f"process=True needs a killable guest, and there is none: {'; '.join(reasons)}", "run: rlm-sandbox doctor"
    )


def open_process(config: SessionConfig, capabilities: Capabilities) -> REPLProtocol:
    """Open a session of the policy in a guest process.

    Raises:
        BackendUnavailable: there is no guest.
        GuestError, LimitExceeded, GuestCrashed: ``config.setup`` failed.
    """
    setup = guest_setup(config.setup, config.limits)
    return ProcessSession(inner_backend().open(replace(config, setup=setup, options=None)), capabilities)


def guest_setup(setup: str, limits: Limits) -> str:
    """Source that installs the policy in a guest, and then runs the caller's ``setup`` under it."""
    sources = {"RestrictedPython": ""}
    for name in _RESTRICTED_PYTHON:
        sources[f"RestrictedPython.{name}"] = _text("RestrictedPython", f"{name}.py")
    for name in _POLICY:
        module = "rlm_policy" if name == "__init__" else f"rlm_policy.{name}"
        sources[module] = _text(f"{__package__}.policy", f"{name}.py")
    boot = _text(f"{__package__}.policy", "guest_boot.py")
    max_bytes = _MAX_BYTES if limits.memory_mb is None else limits.memory_mb << 20
    source = f"{boot}\ninstall({sources!a}, {setup!a}, {max_bytes}, names)\n"
    # In a namespace of its own: the session's will be restricted. Its file is one of the runner's, which tracebacks leave out.
    return (
        f"exec(compile({source!a}, type(session_names.__self__).handle.__code__.co_filename, 'exec', dont_inherit=True), "
        "{'__name__': 'rlm_boot', '__file__': type(session_names.__self__).handle.__code__.co_filename, 'names': globals()})\n"
    )


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text("utf-8")


class ProcessSession:
    """A session of another backend under this backend's name. Everything is that session's doing."""

    def __init__(self, inner: REPLProtocol, capabilities: Capabilities) -> None:
        self._inner = inner
        self._capabilities = capabilities
        self.exec = inner.exec
        self.get = inner.get
        self.set = inner.set
        self.bind = inner.bind
        self.names = inner.names
        self.interrupt = inner.interrupt
        self.reset = inner.reset
        self.close = inner.close

    @property
    def capabilities(self) -> Capabilities:
        """See `REPLProtocol`."""
        return self._capabilities

    @property
    def limits(self) -> Limits:
        """The session's limits."""
        return self._inner.limits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
