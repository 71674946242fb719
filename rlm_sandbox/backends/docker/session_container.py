"""`SessionContainer`: the container of one session, from its creation to its removal, whatever the session speaks by."""

from __future__ import annotations

import os
import time

from docker.types import Mount

from ...bridge.guest import Death, GuestLost
from ...errors import BackendUnavailable
from ...limits import Limits
from ...options import DockerOptions
from .attached import Attached
from .container import WAIT_SECONDS, create_container
from .engine import Engine, mapped_errors

__all__ = ("SESSION_SLACK_SECONDS", "START_SECONDS", "SessionContainer")

#: The host ends a session at ``session_seconds``; a supervisor whose host did not come back for it ends itself.
SESSION_SLACK_SECONDS = 5.0
START_SECONDS = 30.0


class SessionContainer:
    """Not thread-safe: its session is."""

    def __init__(
        self, engine: Engine, options: DockerOptions, limits: Limits, *, recovery: bool, contexts: Mount, sockets: bool
    ) -> None:
        """Create it and attach to it; it does not run yet.

        Args:
            engine: where.
            options, limits, recovery: see `rlm_sandbox.open_repl`.
            contexts: the mount in which its contexts, or the host's socket, are found.
            sockets: whether it speaks by that socket instead of the attached stream.

        Raises:
            BackendUnavailable: the engine refuses, or does not answer.
        """
        self._engine = engine
        self._owner = os.getpid()
        self._created = time.monotonic()
        self._id = create_container(engine, options, limits, recovery=recovery, contexts=contexts, sockets=sockets)
        try:
            with mapped_errors("attaching to a container"):
                params = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
                self.attached = Attached(engine.api.attach_socket(self._id, params=params))
        except BaseException:
            self.remove()
            raise

    def start(self) -> None:
        """Run it. Raises `BackendUnavailable` if the engine cannot."""
        with mapped_errors("starting a container"):
            self._engine.api.start(self._id)

    def check_age(self) -> None:
        """Raises `GuestLost` for one that has waited for so long that sweeps of other hosts may soon take it for a leftover."""
        if time.monotonic() - self._created > WAIT_SECONDS:
            raise GuestLost("it has waited for so long that sweeps of other hosts may soon take it for a leftover")

    def gone(self) -> GuestLost:
        """What is to be said when it has ended by itself."""
        return GuestLost("the container is gone", Death(out_of_memory=self._engine.ran_out_of_memory(self._id)))

    def did_not_start(self, why: object) -> BackendUnavailable:
        """What is to be said when a session did not come to life in it: with its last word on standard error."""
        words = self.attached.words.decode("utf-8", "replace").strip().splitlines()
        last = f"; it said: {words[-1][:300]}" if words else ""
        return BackendUnavailable("docker", f"a container did not start ({why}{last})", "run: rlm-sandbox doctor")

    def remove(self) -> None:
        """Kill and remove it, if this process made it. Never raises. Idempotent."""
        if self._owner == os.getpid() and self._id:
            self._engine.remove(self._id)
            self._id = ""
