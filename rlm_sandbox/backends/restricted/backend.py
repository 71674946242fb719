"""What the registry sees of `restricted`: probe, capabilities, open."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import version
from typing import Final

import RestrictedPython

from ...options import BackendOptions, RestrictedOptions
from ...protocol import Capabilities, Feature, Grade, REPLProtocol
from ...registry import Availability, SessionConfig
from .policy.modules import MODULE_NAMES
from .process import ISOLATION, open_process, probe_process, process_capabilities
from .session import RestrictedSession

__all__ = ("RestrictedBackend",)

_REMEDY: Final = "run: pip install 'rlm-sandbox[restricted]'"
_LANGUAGE: Final = frozenset(
    {
        Feature.CLASSES, Feature.INHERITANCE, Feature.GENERATORS, Feature.CLOSURES, Feature.DEL, Feature.IMPORTS, Feature.MATCH,
        Feature.LATE_GLOBALS, Feature.ECHO, Feature.INPUT_EOF, Feature.SYSTEM_EXIT, Feature.SOURCE_TRACEBACKS,
    }
)  # fmt: skip
_NOTES: Final = (
    "This is Python without async, threads, files, metaclasses, and names that begin with two underscores.",
    f"Importable: {' '.join(MODULE_NAMES)}.",
)


class RestrictedBackend:
    """See `registry.Backend`."""

    def probe(self, options: BackendOptions | None = None) -> Availability:
        """Whether RestrictedPython is of the version this was written for, and the process it is to run in can be had."""
        found = version(RestrictedPython.__name__)
        if sys.implementation.name != "cpython":
            return Availability(False, f"RestrictedPython knows CPython only, not {sys.implementation.name}", "use CPython")
        if found.partition(".")[0] != "9":
            return Availability(False, f"RestrictedPython {found} is not of version 9", _REMEDY)
        chosen = _process(options)
        if chosen is not None:
            return probe_process(chosen)
        return Availability(True)

    def capabilities(self, config: SessionConfig) -> Capabilities:
        """What a session enforces."""
        chosen = _process(config.options)
        if chosen is not None:
            return replace(
                process_capabilities(config, chosen),
                backend="restricted",
                language=_LANGUAGE,
                files=False,
                packages=False,
                fork=False,
                guest_threads=False,
                notes=_NOTES,
            )
        return Capabilities(
            backend="restricted",
            isolation=ISOLATION,
            time_seconds=Grade.COOPERATIVE,
            wall_seconds=Grade.COOPERATIVE,
            output_bytes=Grade.COOPERATIVE,
            host_calls=Grade.COOPERATIVE,
            value_bytes=Grade.COOPERATIVE,
            memory_mb=Grade.NONE,
            processes=Grade.COOPERATIVE,
            disk_mb=Grade.COOPERATIVE,
            session_seconds=Grade.COOPERATIVE,
            network=Grade.COOPERATIVE,
            crash=Grade.NONE,
            interrupt=Grade.COOPERATIVE,
            language=_LANGUAGE,
            soft_interrupt=True,
            recovery="kept",
            context_route="object",
            notes=_NOTES,
        )

    def open(self, config: SessionConfig) -> REPLProtocol:
        """Open a session.

        Raises:
            BackendUnavailable: with ``process=True``, there is no process to run it in.
            GuestError, LimitExceeded: ``setup`` failed.
        """
        chosen = _process(config.options)
        if chosen is not None:
            return open_process(config, chosen, self.capabilities(config))
        return RestrictedSession(config, self.capabilities(config))


def _process(options: BackendOptions | None) -> RestrictedOptions | None:
    """The options, if they ask for a process of its own."""
    return options if isinstance(options, RestrictedOptions) and options.process else None
