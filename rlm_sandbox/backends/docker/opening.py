"""Which way a session and its container speak: by sockets of their own where the engine is this machine's, else by its attached stream."""

from __future__ import annotations

import logging
from typing import Final

from ...bridge.guest import Guest
from ...limits import Limits
from ...options import DockerOptions
from .attached_guest import AttachedGuest
from .engine import Engine
from .socket_guest import NoSockets, open_by_sockets

__all__ = ("start_guest",)

log: Final = logging.getLogger("rlm_sandbox.docker")


def start_guest(engine: Engine, options: DockerOptions, limits: Limits, *, recovery: bool) -> Guest:
    """Start a session's container. Both ways keep the same promises; by sockets a cell takes a third of the time.

    Only on the engine's default runtime: gVisor lets no container connect to a socket of the host unless it is told to. An engine
    whose containers cannot reach this process by a socket (a virtual machine, a policy of SELinux) is asked once for each process.

    Raises:
        BackendUnavailable: the engine refuses, does not answer, or the container does not start.
    """
    if options.channel == "auto" and options.runtime is None and engine.shares_sockets:
        try:
            return open_by_sockets(engine, options, limits, recovery=recovery)
        except NoSockets as exc:
            guest = AttachedGuest(engine, options, limits, recovery=recovery)
            engine.shares_sockets = False
            log.warning("sessions speak by their containers' attached streams, which is slower: %s", exc)
            return guest
    return AttachedGuest(engine, options, limits, recovery=recovery)
