"""`Guest`: the life of a framed guest process, apart from the conversation with it. One implementation per technique."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..context import Context, DataContext
from ..results import Stream

__all__ = ("CopyingGuest", "DataChannel", "Death", "Guest", "GuestLost", "Recovery", "Report", "SharedStream")


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended, as the kernel told. ``status`` is a wait status; times in seconds, memory in MiB.

    ``out_of_memory``: the kernel killed it because its group had used up its memory.
    """

    status: int | None = None
    cpu_seconds: float | None = None
    peak_memory_mb: float | None = None
    why: str = ""
    out_of_memory: bool = False


class GuestLost(Exception):
    """The guest cannot be recovered or reached any more; the session is over or must be rebuilt."""

    def __init__(self, reason: str, death: Death = Death()) -> None:
        super().__init__(reason)
        self.death = death


@dataclass(frozen=True, slots=True)
class Report:
    """What the supervisor said unasked (``died``, ``standby_died``) or in answer to a ticket (``protected``, ``unprotected``)."""

    kind: Literal["died", "standby_died", "protected", "unprotected"]
    death: Death = Death()


@dataclass(frozen=True, slots=True)
class Recovery:
    """After a kill: ``restored`` from the standby, or a ``fresh`` and empty worker."""

    state: Literal["restored", "fresh"]
    death: Death


class DataChannel(Protocol):
    """A non-blocking stream to a worker: a socket, or something that is used like one."""

    def fileno(self) -> int:
        """The descriptor to poll."""

    def send(self, data: bytes | memoryview, /) -> int:
        """Send some of it. Raises BlockingIOError, or OSError if the worker is gone."""

    def sendall(self, data: bytes, /) -> None:
        """Send a short message whole. Raises OSError."""

    def sendmsg(self, buffers: Sequence[bytes | memoryview], ancillary: Sequence[tuple[int, int, Any]], /) -> int:
        """As `send`, with descriptors beside it."""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """What is there, at most ``size`` bytes; empty at the end. Raises BlockingIOError, or OSError at the end."""


class SharedStream(Protocol):
    """A stream that carries all channels of a guest, where they share one descriptor (the data channel's) of the host.

    What is not data it passes on to descriptors of their own, by which the session finds it. See `Readiness`.
    """

    ended: bool

    @property
    def unsent(self) -> bool:
        """Whether something waits for the stream to take it."""

    @property
    def has_data(self) -> bool:
        """Whether the data channel has something, or ends. What the worker printed before is passed on first."""

    @property
    def takes_data(self) -> bool:
        """Whether the data channel takes something."""

    @property
    def held(self) -> bool:
        """Whether something that came waits for the session to take what came before it."""

    def before_waiting(self) -> None:
        """The session is about to wait for the worker, which it has given the turn, or which has nothing to do."""

    def serve(self) -> bool:
        """Take what has come, and send what waits. Never waits. True if something was passed on."""


class Guest(Protocol):
    """A guest that speaks frames. Signals and kills come from outside; nothing here waits for guest code."""

    maps_contexts: bool
    """Whether a context's memory file can be sent along with a frame."""

    @property
    def data(self) -> DataChannel:
        """The present worker's data channel. Replaced or emptied by `recover`."""

    @property
    def stream(self) -> SharedStream | None:
        """What carries all channels, where they share one descriptor; None where each has its own."""

    @property
    def outputs(self) -> Mapping[int, Stream]:
        """Descriptors that carry what the guest prints, non-blocking."""

    @property
    def control_fd(self) -> int:
        """Readable when `report` has something."""

    def restart_clock(self, seconds: float | None) -> None:
        """The session lasts for ``seconds`` from now on. Raises `GuestLost` if it is over."""

    def report(self) -> Report | None:
        """The next report, or None if there is none now. Raises `GuestLost` at the end of the supervisor."""

    def wake(self) -> None:
        """Let the worker run: a turn begins."""

    def stop(self) -> None:
        """Stop the worker: a turn has ended, nothing of it runs uncounted."""

    def interrupt(self) -> None:
        """Ask the worker's main thread to end the cell (KeyboardInterrupt)."""

    def cpu_seconds(self) -> float | None:
        """CPU time of the present worker so far, measured from outside."""

    def peak_memory_mb(self) -> float | None:
        """Peak resident memory of the present worker, measured from outside."""

    def memory_headroom_mb(self) -> float | None:
        """What the present worker may still allocate, measured from outside; None if it cannot be told."""

    def grow_address_space(self, size: int) -> None:
        """Make room for a mapping of ``size`` bytes beside the memory limit."""

    def open_context(self, context: Context | DataContext) -> int:
        """A descriptor of the context's memory file, which goes beside the message that binds it; the caller closes it."""

    def request_protection(self) -> None:
        """Grant the ticket for one standby. The caller then tells the worker to fork, and waits for a report."""

    def recover(self, *, fresh: bool) -> Recovery:
        """Kill the worker, and have the standby or an empty worker in its place. Raises `GuestLost` if that fails."""

    def close(self) -> None:
        """End everything of the guest. Idempotent; never raises."""


class CopyingGuest(Guest, Protocol):
    """A guest whose recovery points can also become sessions of their own, and be kept to go back to."""

    def drop_standby(self) -> None:
        """Give up the standby, whose memory is needed; a report follows if there was one."""

    def check_descriptors(self) -> None:
        """Raises `GuestLost` if this process has too few for what follows here; nothing has changed then."""

    def branch(self) -> CopyingGuest:
        """The standby as a guest of its own, which the caller closes. Raises `GuestLost` if it cannot be had; this one goes on."""

    def keep(self, key: int) -> None:
        """Keep the standby under ``key``. Raises `GuestLost` if there is none, or no room."""

    def forget(self, key: int) -> None:
        """End what was kept under ``key``."""

    def take_over(self, key: int | None) -> Recovery | None:
        """Kill the worker, and have what was kept under ``key``, or the standby, in its place, with outputs of its own.

        None if what was kept is not there any more: nothing has changed. Raises `GuestLost` if it fails.
        """
