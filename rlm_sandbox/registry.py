"""Backends by name, imported when opened. The only place that knows which backends exist."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from .errors import BackendUnavailable, UnsupportedLimit
from .limits import Limits
from .options import BackendOptions, DockerOptions, JailOptions, MontyOptions, RestrictedOptions, WasmOptions
from .protocol import Capabilities, Feature, Grade, REPLProtocol

__all__ = (
    "AUTO_ORDER",
    "Availability",
    "Backend",
    "HasParts",
    "Part",
    "SessionConfig",
    "available",
    "backend_names",
    "load_backend",
    "open_repl",
    "prune",
)


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend works here. ``reason`` and ``remedy`` are empty when it does."""

    usable: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """Everything `open_repl` was asked for, checked; what a backend opens a session from."""

    limits: Limits = field(default_factory=Limits)
    setup: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    recovery: bool = True
    options: BackendOptions | None = None


class Backend(Protocol):
    """What a backend module offers the registry, as its module-level ``BACKEND``."""

    def probe(self, options: BackendOptions | None = None) -> Availability:
        """Try the mechanism itself, cheaply; never raise, never leave anything behind. ``options`` may choose another one."""

    def capabilities(self, config: SessionConfig) -> Capabilities:
        """What a session opened with ``config`` would enforce. Called after a successful `probe`."""

    def open(self, config: SessionConfig) -> REPLProtocol:
        """Open a session. Raises `BackendUnavailable` if a layer is missing."""


@runtime_checkable
class PrunesLeftovers(Protocol):
    """A backend whose sessions can outlive their host on an engine."""

    def prune(self) -> list[str]:
        """Remove what dead hosts left behind; returns its names. Raises `BackendUnavailable` if the engine does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing a backend rests on, for whoever asks why it does not work.

    ``found`` is what was seen, ``consequence`` one sentence on what follows, ``remedy`` what helps (empty if nothing is amiss).
    ``needed`` is False for what only makes it slower or larger.
    """

    name: str
    works: bool
    found: str
    consequence: str
    remedy: str = ""
    needed: bool = True


@runtime_checkable
class HasParts(Protocol):
    """A backend that can say which of the things it rests on are there, without opening a session."""

    def parts(self) -> Iterator[Part]:
        """Look at each; never raises."""


@dataclass(frozen=True, slots=True)
class _Entry:
    module: str
    options: type[BackendOptions]
    requires: str
    """The package whose absence makes the import fail, for the remedy; empty if none."""
    remedy: str
    lacks: frozenset[Feature] = frozenset()
    """What its default guest's language has not; its capabilities say the same, which a test checks."""


# In alphabetical order, which a test checks.
_BACKENDS: Final[dict[str, _Entry]] = {
    "docker": _Entry("rlm_sandbox.backends.docker", DockerOptions, "docker", "run: pip install 'rlm-sandbox[docker]'"),
    "jail": _Entry("rlm_sandbox.backends.jail", JailOptions, "", "use Linux 5.14 or newer, or another backend"),
    "monty": _Entry(
        "rlm_sandbox.backends.monty", MontyOptions, "pydantic_monty", "run: pip install 'rlm-sandbox[monty]'",
        lacks=frozenset({
            Feature.CPYTHON, Feature.INHERITANCE, Feature.GENERATORS, Feature.DEL, Feature.IMPORTS, Feature.THREADS,
            Feature.INPUT_EOF, Feature.FILES, Feature.RAW_DESCRIPTORS,
        }),
    ),
    "restricted": _Entry(
        "rlm_sandbox.backends.restricted", RestrictedOptions, "RestrictedPython", "run: pip install 'rlm-sandbox[restricted]'",
        lacks=frozenset({
            Feature.CPYTHON, Feature.ASYNC, Feature.TOP_LEVEL_AWAIT, Feature.THREADS, Feature.FILES, Feature.RAW_DESCRIPTORS,
        }),
    ),
    "wasm": _Entry(
        "rlm_sandbox.backends.wasm", WasmOptions, "wasmtime", "run: pip install 'wasmtime==50.0.1'",
        lacks=frozenset({Feature.THREADS, Feature.FILES}),
    ),
}  # fmt: skip

#: What ``auto`` tries, in this order. ``restricted`` is never here: it is no isolation.
AUTO_ORDER: Final = ("jail", "wasm")


def backend_names() -> tuple[str, ...]:
    """The names `open_repl` accepts, besides ``auto``."""
    return tuple(_BACKENDS)


def backends_with(feature: Feature) -> tuple[str, ...]:
    """The backends whose language has ``feature``, installed or not, without importing any: together that takes most of a second."""
    return tuple(name for name, entry in _BACKENDS.items() if feature not in entry.lacks)


def load_backend(name: str) -> Backend:
    """Import a backend's module.

    Raises:
        ValueError: there is no such backend.
        BackendUnavailable: a package it needs is not installed.
    """
    entry = _BACKENDS.get(name)
    if entry is None:
        raise ValueError(f"unknown backend {name!r}; choose from auto, {', '.join(_BACKENDS)}")
    try:
        module = importlib.import_module(entry.module)
    except ImportError as exc:
        missing = (exc.name or "").partition(".")[0]
        if entry.requires and missing == entry.requires:
            raise BackendUnavailable(name, f"the package {missing} is not installed", entry.remedy) from exc
        raise
    backend: Backend = module.BACKEND
    return backend


def prune(name: str) -> list[str]:
    """Remove what dead hosts left behind on a backend's engine. Returns the names of what was removed.

    Raises:
        ValueError: there is no such backend, or none of its sessions can outlive its host.
        BackendUnavailable: the engine does not answer, or a package is missing.
    """
    backend = load_backend(name)
    if not isinstance(backend, PrunesLeftovers):
        raise ValueError(f"backend {name!r} leaves nothing behind that could be pruned")
    return backend.prune()


def _probe(name: str, options: BackendOptions | None = None) -> Availability:
    try:
        return load_backend(name).probe(options)
    except BackendUnavailable as exc:
        return Availability(False, exc.reason, exc.remedy)


def available() -> dict[str, Availability]:
    """Every backend and whether it works here, found by trying it."""
    return {name: _probe(name) for name in _BACKENDS}


def _check_grades(capabilities: Capabilities, limits: Limits, accept: Grade, trusted: bool) -> None:
    asked = [
        name
        for name in (
            "time_seconds", "wall_seconds", "output_bytes", "host_calls", "value_bytes",
            "memory_mb", "processes", "disk_mb", "session_seconds", "network",
        )
        if getattr(limits, name) is not None
    ]  # fmt: skip
    below_accept = [name for name in asked if capabilities.grade(name) < accept]
    if below_accept:
        listed = ", ".join(f"{name} ({capabilities.grade(name).name})" for name in below_accept)
        raise UnsupportedLimit(
            f"backend {capabilities.backend!r} does not enforce {listed} at grade {accept.name}; choose another backend, "
            f"say None for the limit, or accept a lower grade with accept=Grade.COOPERATIVE, trusted=True"
        )
    below_hard = [name for name in (*asked, "crash", "interrupt") if capabilities.grade(name) < Grade.HARD]
    if below_hard and not trusted:
        listed = ", ".join(f"{name} ({capabilities.grade(name).name})" for name in below_hard)
        raise UnsupportedLimit(
            f"backend {capabilities.backend!r} does not enforce {listed} from outside the guest; "
            f"say trusted=True if the code that runs in it is trusted, or choose another backend"
        )


def _checked_config(
    limits: Limits, setup: str, files: Mapping[str, Any] | tuple[()], packages: tuple[str, ...], recovery: bool, options: Any
) -> SessionConfig:
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be a Limits, not {type(limits).__name__}")
    if not isinstance(setup, str):
        raise TypeError(f"setup must be source code as a str, not {type(setup).__name__}")
    if isinstance(packages, str):
        raise TypeError(f"packages takes a tuple of names, not one string; write ({packages!r},)")
    if not isinstance(packages, Iterable):
        raise TypeError(f"packages takes a tuple of names, not {type(packages).__name__}")
    if not all(isinstance(name, str) and name for name in packages):
        raise TypeError("packages takes names as texts that are not empty")
    if files != () and not isinstance(files, Mapping):
        raise TypeError(f"files takes a dict of names and paths, not {type(files).__name__}")
    if not all(isinstance(name, str) for name in dict(files)):
        raise TypeError("files takes names as texts")
    for name, path in dict(files).items():
        if not isinstance(path, str | PathLike):
            raise TypeError(f"files takes paths as texts or Path objects; {name!r} has {type(path).__name__}")
    if options is not None and not isinstance(options, BackendOptions):
        raise TypeError(f"options must be a backend's options object such as JailOptions(), not {type(options).__name__}")
    return SessionConfig(
        limits=limits,
        setup=setup,
        files={name: Path(path) for name, path in dict(files).items()},
        packages=tuple(packages),
        recovery=bool(recovery),
        options=options,
    )


def _resolve(name: str, options: BackendOptions | None) -> tuple[str, Backend]:
    if name != "auto":
        backend = load_backend(name)
        wanted = _BACKENDS[name].options
        if options is not None and type(options) is not wanted:
            raise TypeError(f"backend {name!r} takes {wanted.__name__}, not {type(options).__name__}")
        found = backend.probe(options)
        if not found.usable:
            raise BackendUnavailable(name, found.reason, found.remedy)
        return name, backend
    reasons = []
    for candidate in AUTO_ORDER:
        if options is not None and type(options) is not _BACKENDS[candidate].options:
            continue
        found = _probe(candidate, options)
        if found.usable:
            return candidate, load_backend(candidate)
        reasons.append(f"{candidate}: {found.reason} ({found.remedy})")
    raise BackendUnavailable("auto", "; ".join(reasons) or "no backend takes these options", "run: rlm-sandbox doctor")


def open_repl(
    name: str = "auto",
    *,
    limits: Limits | None = None,
    accept: Grade = Grade.HARD,
    trusted: bool = False,
    setup: str = "",
    files: Mapping[str, Any] | tuple[()] = (),
    packages: tuple[str, ...] = (),
    recovery: bool = True,
    options: BackendOptions | None = None,
) -> REPLProtocol:
    """Open a sandboxed Python REPL.

    Args:
        name: a backend's name, or ``auto``: the best isolation this machine has.
        limits: what the session may use; the default is finite in every field.
        accept: the lowest grade of enforcement the caller accepts for the limits asked for.
        trusted: the code in the cells is trusted. Needed below ``Grade.HARD``, in so many words.
        setup: source run in the guest at the start and again after every reset; an error in it is a `GuestError`.
        files: name to host path of a file or directory, read-only at ``/input/NAME``, where the backend has the capability.
        packages: names of packages of this environment, importable in the guest with what they depend on, where the backend
            has the capability.
        recovery: keep a recovery point, so that a killed cell costs only itself.
        options: the backend's typed options.

    Raises:
        BackendUnavailable: with the remedy.
        InputRefused: a file or package cannot be given to the session, with the remedy.
        UnsupportedLimit: a limit cannot be enforced at the accepted grade.
        TypeError, ValueError: an argument is wrong.
    """
    config = _checked_config(limits if limits is not None else Limits(), setup, files, packages, recovery, options)
    chosen, backend = _resolve(name, config.options)
    capabilities = backend.capabilities(config)
    _check_grades(capabilities, config.limits, Grade(accept), trusted)
    if config.packages and not capabilities.packages:
        raise ValueError(f"backend {chosen!r} cannot make host packages importable; leave packages=() or choose another backend")
    if config.files and not capabilities.files:
        raise ValueError(f"backend {chosen!r} cannot mount input files; leave files=() or choose another backend")
    return backend.open(config)
