"""Typed options of each backend, for ``open_repl(options=...)``. Frozen data; importing this imports no engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ("BackendOptions", "DockerOptions", "JailOptions", "MontyOptions", "RestrictedOptions", "WasmOptions")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """Base of every backend's options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerOptions(BackendOptions):
    """Options of the ``docker`` backend.

    ``image``: the runner image, as ``make image`` tags it. ``runtime``: the engine's name for a runtime (``"runsc"`` is
    gVisor); None is the engine's default. ``cpus``: processors a session may use, fractions allowed; None is no limit.
    ``docker_host``: the engine's address (``"unix:///run/docker.sock"``, ``"tcp://..."`` with TLS as ``DOCKER_TLS_VERIFY`` and
    ``DOCKER_CERT_PATH`` say, ``"ssh://user@machine"``); None is what ``DOCKER_HOST`` says. ``channel``: ``"auto"`` lets a
    container on this machine's engine and default runtime (``runtime=None``) connect once to a socket of this process, past the
    engine, which makes a cell three times as fast; ``"attached"`` always speaks by the container's attached stream.
    """

    image: str = "rlm-sandbox-runner:0.1"
    runtime: str | None = None
    cpus: float | None = 1.0
    docker_host: str | None = None
    channel: Literal["auto", "attached"] = "auto"

    def __post_init__(self) -> None:
        for name in ("image", "runtime", "docker_host"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise TypeError(f"DockerOptions.{name} must be a text that is not empty")
        if self.image is None:
            raise TypeError("DockerOptions.image must be the name of an image")
        if self.channel not in ("auto", "attached"):
            raise ValueError(f"DockerOptions.channel must be 'auto' or 'attached', got {self.channel!r}")
        _check_cpus("DockerOptions", self.cpus)


def _check_cpus(owner: str, cpus: object) -> None:
    if cpus is None:
        return
    if isinstance(cpus, bool) or not isinstance(cpus, int | float):
        raise TypeError(f"{owner}.cpus must be a number of processors or None")
    if not 0.01 <= cpus <= 4096:
        raise ValueError(f"{owner}.cpus must be between 0.01 and 4096, got {cpus}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JailOptions(BackendOptions):
    """Options of the ``jail`` backend.

    - ``isolation``: ``"namespaces"``. Landlock and seccomp alone are not offered: they would not keep what the grades promise.
    - ``owner``: whose session it is: any text, a tenant's id for example. Sessions of one owner are forked from one interpreter
      and share its memory layout and hash seed; sessions of different owners share neither. Each owner costs an interpreter
      (0.2 s at the first session, 25 MB while it is kept).
    - ``cpus``: processors a session may use, fractions allowed; None is no limit. Needs a cgroup.
    - ``cgroup``: ``"auto"`` puts each session into a control group where this user may make one, which ``capabilities.layers``
      tells; ``"require"`` makes the backend unavailable where that bounds not both memory and tasks.
    """

    isolation: Literal["namespaces"] = "namespaces"
    owner: str = ""
    cpus: float | None = None
    cgroup: Literal["auto", "require"] = "auto"

    def __post_init__(self) -> None:
        if self.isolation != "namespaces":
            raise ValueError(
                f"JailOptions.isolation must be 'namespaces', got {self.isolation!r}; where there are no user namespaces use wasm or docker"
            )
        if not isinstance(self.owner, str):
            raise TypeError(f"JailOptions.owner must be a text, not {type(self.owner).__name__}")
        if self.cgroup not in ("auto", "require"):
            raise ValueError(f"JailOptions.cgroup must be 'auto' or 'require', got {self.cgroup!r}")
        _check_cpus("JailOptions", self.cpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class MontyOptions(BackendOptions):
    """Options of the ``monty`` backend.

    - ``max_processes``: worker processes of the pool this session belongs to. More sessions may be open: an idle one
      is parked, its state kept as a dump in the host's memory, until it is used again.
    - ``spare_workers``: processes that wait beyond those: so many for the next sessions, and as many for restoring one.
    - ``confinement``: ``"kernel"`` puts each worker into namespaces of its own, behind a seccomp allow-list, and is not
      available where the kernel does not allow it. ``"language"`` leaves the interpreter of the subset as the only wall
      between the guest and what the host's user may do; say so only where that is enough.
    """

    max_processes: int = 16
    spare_workers: int = 1
    confinement: Literal["kernel", "language"] = "kernel"

    def __post_init__(self) -> None:
        for name, low in (("max_processes", 1), ("spare_workers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"MontyOptions.{name} must be a whole number")
            if not low <= value <= 4096:
                raise ValueError(f"MontyOptions.{name} must be between {low} and 4096, got {value}")
        if self.confinement not in ("kernel", "language"):
            raise ValueError(f"MontyOptions.confinement must be 'kernel' or 'language', got {self.confinement!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RestrictedOptions(BackendOptions):
    """Options of the ``restricted`` backend.

    ``process``: run the policy in a killable guest process, which enforces the limits, instead of in the host's own: in a
    guest of the jail where there is one, in a plain child elsewhere. ``"plain"``: in a plain child everywhere.
    """

    process: bool | Literal["plain"] = False

    def __post_init__(self) -> None:
        if not isinstance(self.process, bool) and self.process != "plain":
            raise TypeError("RestrictedOptions.process must be True, False or 'plain'")


@dataclass(frozen=True, slots=True, kw_only=True)
class WasmOptions(BackendOptions):
    """Options of the ``wasm`` backend.

    ``cache``: where compiled code is kept, a directory of the user's own; None for ``RLM_SANDBOX_CACHE`` or the user's cache.
    """

    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and not isinstance(self.cache, Path):
            raise TypeError(f"WasmOptions.cache must be a pathlib.Path or None, not {type(self.cache).__name__}")
