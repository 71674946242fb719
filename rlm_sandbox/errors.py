"""Every exception the library raises, classed by what the caller must do next.

A guest can never make ``exec`` raise: what a cell does is an `ExecResult`. These classes are for what the
*caller* has to act on, and for the calls that return a plain value (``get``, ``set``, ``bind``, ``names``).
"""

from __future__ import annotations

__all__ = (
    "BackendUnavailable",
    "GuestCrashed",
    "GuestError",
    "InputRefused",
    "LimitExceeded",
    "PoolTimeout",
    "ProtocolViolation",
    "SandboxError",
    "SessionBusy",
    "SessionClosed",
    "UnsendableValue",
    "UnsupportedLimit",
)


class SandboxError(Exception):
    """Base of everything this library raises on purpose."""


class GuestError(SandboxError):
    """Guest code that ran for a ``get``, ``set``, ``bind`` or ``names`` raised.

    The session is usable. A retry runs the same guest code again and is rarely sensible.
    ``type_name`` and ``traceback`` are the guest's own words: data, never to be believed or evaluated.
    """

    def __init__(self, type_name: str, message: str, traceback: str = "") -> None:
        super().__init__(f"{type_name}: {message}" if message else type_name)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback


class LimitExceeded(SandboxError):
    """Guest code that ran for a ``get``, ``set``, ``bind`` or ``names`` hit a limit.

    The session is usable; ``kind``, ``limit`` and ``observed`` say which limit and by how much.
    Retry only with a wider limit, which means a new session.
    """

    def __init__(self, kind: str, limit: float, observed: float | None = None) -> None:
        seen = "" if observed is None else f" (observed {observed:,})"
        super().__init__(f"the {kind} limit of {limit:,} was hit{seen}; open a session with a wider limit if the work needs it")
        self.kind = kind
        self.limit = limit
        self.observed = observed


class GuestCrashed(SandboxError):
    """The guest died unannounced during a ``get``, ``set``, ``bind`` or ``names``.

    The session is usable and was restored or emptied as ``state`` says (``restored``, ``lost``).
    """

    def __init__(self, message: str, *, exit_status: int | None = None, state: str = "lost") -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.state = state


class ProtocolViolation(SandboxError):
    """The guest broke the turn rules during a ``get``, ``set``, ``bind`` or ``names`` and was killed.

    The session is usable if it could be recovered; otherwise the next call raises `SessionClosed`.
    """


class BackendUnavailable(SandboxError):
    """A backend, or a layer it needs, is missing on this machine. ``remedy`` names what to do.

    There is no session. A retry is sensible after the remedy. A backend that lacks a layer is
    unavailable, never weaker.
    """

    def __init__(self, backend: str, reason: str, remedy: str) -> None:
        super().__init__(f"backend {backend!r} is unavailable: {reason}; {remedy}")
        self.backend = backend
        self.reason = reason
        self.remedy = remedy


class InputRefused(SandboxError, ValueError):
    """A file or a package that a session was to be opened with cannot be given to it. ``remedy`` names what to do.

    There is no session. A retry is sensible after the remedy. ``name`` is the file's name in the guest, or the package's.
    """

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(f"{name!r} cannot be given to the session: {reason}; {remedy}")
        self.name = name
        self.reason = reason
        self.remedy = remedy


class UnsupportedLimit(SandboxError):
    """A limit was asked for that the backend cannot enforce at the accepted grade.

    There is no session. Choose another backend, or accept a lower grade in so many words
    (``accept=Grade.COOPERATIVE, trusted=True``), or say ``None`` for the limit.
    """


class SessionBusy(SandboxError):
    """A second call came while one is running, also from inside the session's own host function.

    The session is usable and the running call is untouched. Retry when it has ended; only ``interrupt()``
    and ``close()`` may come concurrently.
    """


class SessionClosed(SandboxError):
    """The session was closed, reached ``session_seconds``, or could not be rebuilt after a failure.

    Open a new session.
    """


class PoolTimeout(SandboxError):
    """No session became free in a bounded pool within the given time. Retry later or enlarge the pool."""


class UnsendableValue(SandboxError, ValueError):
    """A host value cannot cross into a guest exactly: its type, size, depth or element count.

    The session is usable. Send plain data, or ``bind`` an object with ``expose()``.
    """
