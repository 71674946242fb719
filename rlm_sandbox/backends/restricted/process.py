"""``RestrictedOptions(process=True)``: the same policy in a killable guest process, by way of the registry.

The guest is opened as an ordinary session whose ``setup`` brings the policy along as sources: a session of the jail where there
is one, else one over a plain child. What is enforced is enforced on that guest, from outside; the policy only decides what cells may write.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from importlib import resources
from types import TracebackType
from typing import Final, Self

from ...bridge.framed import FramedSession
from ...errors import BackendUnavailable
from ...limits import Limits
from ...options import RestrictedOptions
from ...protocol import Capabilities, Grade, REPLProtocol, SupportsWaiting
from ...registry import Availability, Backend, SessionConfig, load_backend
from .child import PlainGuest

__all__ = ("ISOLATION", "ProcessSession", "open_process", "probe_process", "process_capabilities")

#: The sentence that doctor, README and SECURITY.md say too.
ISOLATION: Final = "none against an adversary"
#: The backend whose guest is our runner.
_JAIL: Final = "jail"
_PROBED_MB: Final = 64
#: What the host spends on a child beside its memory: the interpreter itself.
_OVERHEAD_MB: Final = 32
_POLICY: Final = ("__init__", "classes", "transformer", "guards", "names", "modules", "runtime")
#: What the policy needs of RestrictedPython: its list of known syntax.
_RESTRICTED_PYTHON: Final = ("_types", "transformer")
_MAX_BYTES: Final = 1 << 30


def jail(options: RestrictedOptions) -> Backend | None:
    """The backend whose guest runs the policy, None for a plain child."""
    if options.process == "plain":
        return None
    backend = load_backend(_JAIL)
    return backend if backend.probe().usable else None


def probe_process(options: RestrictedOptions) -> Availability:
    """Whether there is a killable process, found by starting one."""
    if jail(options) is not None:
        return Availability(True)
    if os.name != "posix":
        return Availability(False, "process=True needs a POSIX system", "leave process=False")
    try:
        _try_plain_child()
    except BackendUnavailable as exc:
        return Availability(False, exc.reason, exc.remedy)
    return Availability(True)


@functools.cache
def _try_plain_child() -> None:
    """Once is enough where it works; each session's own child tries its limits again."""
    PlainGuest(Limits(memory_mb=_PROBED_MB)).close()


def process_capabilities(config: SessionConfig, options: RestrictedOptions) -> Capabilities:
    """What that process enforces."""
    inner = jail(options)
    if inner is not None:
        declared = inner.capabilities(config)
        return replace(
            declared, isolation=f"that of the process it runs in: {declared.isolation}; of the policy itself: {ISOLATION}"
        )
    memory = config.limits.memory_mb
    return Capabilities(
        backend="restricted",
        isolation=(
            f"{ISOLATION}: a process of the host's that can be killed and has limits of its own, and only the policy between it and "
            "files and the network"
        ),
        time_seconds=Grade.HARD,
        wall_seconds=Grade.HARD,
        output_bytes=Grade.HARD,
        host_calls=Grade.HARD,
        value_bytes=Grade.HARD,
        memory_mb=Grade.HARD,
        processes=Grade.COOPERATIVE,
        disk_mb=Grade.COOPERATIVE,
        session_seconds=Grade.HARD,
        network=Grade.COOPERATIVE,
        crash=Grade.HARD,
        interrupt=Grade.HARD,
        soft_interrupt=True,
        context_route="mapped",
        host_memory_worst_mb=None if memory is None else memory + _OVERHEAD_MB,
    )


def open_process(config: SessionConfig, options: RestrictedOptions, capabilities: Capabilities) -> REPLProtocol:
    """Open a session of the policy in a guest process.

    Raises:
        BackendUnavailable: there is no guest.
        GuestError, LimitExceeded, GuestCrashed: ``config.setup`` failed.
    """
    config = replace(config, setup=guest_setup(config.setup, config.limits), options=None)
    inner = jail(options)
    if inner is not None:
        return ProcessSession(inner.open(config), capabilities)
    config = replace(config, recovery=False)
    # The wrapper leaves out what only a jail makes safe: `read_file` of a plain child would read the host's files.
    return ProcessSession(FramedSession(lambda: PlainGuest(config.limits), config, capabilities), capabilities)


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

    def begin(self) -> bool:
        """See `SupportsWaiting`."""
        return not isinstance(self._inner, SupportsWaiting) or self._inner.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
