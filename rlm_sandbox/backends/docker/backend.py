"""What the registry sees of docker: probe, capabilities, open."""

from __future__ import annotations

from typing import Final

from ...bridge.framed import FramedSession
from ...bridge.grades import ALL_HARD
from ...bridge.guest import Guest
from ...errors import BackendUnavailable
from ...options import BackendOptions, DockerOptions
from ...protocol import Capabilities, Feature, REPLProtocol
from ...registry import Availability, SessionConfig
from .container import memory_mb
from .contexts import sweep
from .engine import engine_for
from .opening import start_guest

__all__ = ("BACKEND", "DockerBackend")


def _options(config: SessionConfig) -> DockerOptions:
    return config.options if isinstance(config.options, DockerOptions) else DockerOptions()


class DockerBackend:
    """See `rlm_sandbox.registry.Backend`."""

    def probe(self, options: BackendOptions | None = None) -> Availability:
        """Ask the engine for the image and the runtime; a container is too much for a probe."""
        wanted = options if isinstance(options, DockerOptions) else DockerOptions()
        try:
            engine_for(wanted.docker_host).check(wanted)
        except BackendUnavailable as exc:
            return Availability(False, exc.reason, exc.remedy)
        return Availability(True)

    def capabilities(self, config: SessionConfig) -> Capabilities:
        """What a session enforces."""
        options = _options(config)
        kernel = (
            "the host's kernel is shared" if options.runtime is None else f"the engine's runtime {options.runtime} stands before it"
        )
        return Capabilities(
            backend="docker",
            isolation=(
                "a container without network, privileges or writable files, of an ordinary user, behind two seccomp allow-lists; "
                f"{kernel}"
            ),
            **ALL_HARD,
            language=frozenset(Feature),
            soft_interrupt=True,
            recovery="standby" if config.recovery else "none",
            context_route="mapped",
            guest_threads=True,
            host_memory_worst_mb=memory_mb(config.limits, recovery=config.recovery, runtime=options.runtime),
            notes=(
                "The REPL is a full CPython with the standard library; there is no network, and no process can be started.",
                "Files can be written below /tmp.",
            ),
        )

    def open(self, config: SessionConfig) -> REPLProtocol:
        """Open a session."""
        options = _options(config)
        engine = engine_for(options.docker_host)

        def guest() -> Guest:
            with engine.opening():
                return start_guest(engine, options, config.limits, recovery=config.recovery)

        return FramedSession(guest, config, self.capabilities(config))

    def prune(self) -> list[str]:
        """See `PrunesLeftovers`."""
        sweep()
        return engine_for(None).prune()


BACKEND: Final = DockerBackend()
