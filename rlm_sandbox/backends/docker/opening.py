"""Which way a session and its container speak: by sockets of their own where the engine is this machine's, else by its attached stream."""

from __future__ import annotations

import errno
import logging
import os
from typing import Final

from ...bridge.guest import Guest
from ...errors import BackendUnavailable
from ...limits import Limits
from ...options import DockerOptions
from .attached_guest import AttachedGuest
from .container import USER_ID
from .engine import Engine
from .socket_guest import NoSockets, open_by_sockets

__all__ = ("start_guest",)

_MORE_DESCRIPTORS: Final = "close sessions, or raise the limit: ulimit -n"
log: Final = logging.getLogger("rlm_sandbox.docker")


def start_guest(engine: Engine, options: DockerOptions, limits: Limits, *, recovery: bool) -> Guest:
    """Start a session's container. Both ways keep the same promises; by sockets a cell takes a third of the time.

    By sockets only on the engine's default runtime: gVisor lets no container connect to a socket of the host unless it is told to. And
    not as the containers' own user, who would own what is sent to them. An engine whose containers cannot connect to this
    process (a policy of SELinux, a virtual machine that shares files only) is asked once for each process.

    Raises:
        BackendUnavailable: the engine refuses, does not answer, or the container does not start.
    """
    try:
        if options.channel == "auto" and options.runtime is None and engine.shares_sockets and os.geteuid() != USER_ID:
            try:
                return open_by_sockets(engine, options, limits, recovery=recovery)
            except NoSockets as exc:
                guest = AttachedGuest(engine, options, limits, recovery=recovery)
                engine.shares_sockets = False
                log.warning("sessions speak by their containers' attached streams, which is slower: %s", exc)
                return guest
        return AttachedGuest(engine, options, limits, recovery=recovery)
    except OSError as exc:
        remedy = _MORE_DESCRIPTORS if exc.errno in (errno.EMFILE, errno.ENFILE) else "see that /dev/shm has room"
        raise BackendUnavailable("docker", f"this process cannot have a session ({exc.strerror or exc})", remedy) from exc
