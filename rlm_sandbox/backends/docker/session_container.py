"""`SessionContainer`: the container of one session, from its creation to its removal, whatever the session speaks by."""

from __future__ import annotations

import os
import time
from typing import Final

from docker.types import Mount

from ...bridge.guest import Death, GuestLost
from ...errors import BackendUnavailable
from ...limits import Limits
from ...options import DockerOptions
from ...runners.framing import StreamFailed
from ...waiting import is_readable
from ...wire import control
from .attached import Attached
from .container import WAIT_SECONDS, create_container
from .engine import Engine, mapped_errors

__all__ = ("RECOVER_SECONDS", "START_SECONDS", "SessionContainer", "settings_for")

#: What is left of the 2 s that recovery may take is for another container: about 0.5 s.
RECOVER_SECONDS: Final = 1.0
#: The host ends a session at ``session_seconds``; a supervisor whose host did not come back for it ends itself.
_SESSION_SLACK_SECONDS: Final = 5.0
START_SECONDS: Final = 30.0
_LAST_WORD_SECONDS: Final = 1.0


def _with_slack(seconds: float | None) -> float | None:
    return None if seconds is None else seconds + _SESSION_SLACK_SECONDS


def settings_for(limits: Limits) -> control.Message:
    """What every supervisor in a container is told of its session, by whichever way."""
    return {
        "op": "settings",
        "memory_mb": limits.memory_mb,
        "disk_mb": limits.disk_mb,
        "seconds": _with_slack(limits.session_seconds),
    }


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

    def clock_order(self, seconds: float | None) -> control.Message:
        """The order by which a session lasts for ``seconds`` from now on.

        Raises:
            GuestLost: it has waited for so long that sweeps of other hosts may soon take it for a leftover.
        """
        if time.monotonic() - self._created > WAIT_SECONDS:
            raise GuestLost("it has waited for so long that sweeps of other hosts may soon take it for a leftover")
        return {"op": "clock", "seconds": _with_slack(seconds)}

    def gone(self) -> GuestLost:
        """What is to be said when it has ended by itself."""
        return GuestLost("the container is gone", Death(out_of_memory=self._engine.ran_out_of_memory(self._id)))

    def last_word(self) -> str:
        """What it said last on standard error, "" if nothing. One that has ended has said everything; that is waited for a little."""
        until = time.monotonic() + _LAST_WORD_SECONDS
        try:
            while is_readable(self.attached.read_fd, max(0.0, until - time.monotonic())):
                self.attached.read()
        except (StreamFailed, OSError, ValueError):  # its end, or this end was closed
            pass
        lines = self.attached.words.decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def did_not_start(self, why: object) -> BackendUnavailable:
        """What is to be said when a session did not come to life in it."""
        word = self.last_word()
        said = f"; it said: {word}" if word else ""
        return BackendUnavailable("docker", f"a container did not start ({why}{said})", "run: rlm-sandbox doctor")

    def remove(self) -> None:
        """Kill and remove it, if this process made it. Never raises. Idempotent."""
        if self._owner == os.getpid() and self._id:
            self._engine.remove(self._id)
            self._id = ""
