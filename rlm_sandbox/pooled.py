"""`PooledSession`: a backend's session as a pool hands it out. It gives its place back when it ends, and what its host
functions open belongs to the pool's next level."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from .errors import SessionClosed
from .limits import Limits
from .protocol import Capabilities, REPLProtocol, SupportsCheckpoint, SupportsFork, SupportsReadFile
from .results import ExecResult, OutputChunk

__all__ = ("PooledSession", "pooled")


@dataclass(frozen=True, slots=True)
class Nesting:
    """``levels``: where host functions find the level of what they open, ``pool``: the pool's key in it, ``level``: that level."""

    levels: contextvars.ContextVar[Mapping[int, int]]
    pool: int
    level: int


class PooledSession:
    """See `REPLProtocol`; every call is the session's own."""

    def __init__(
        self,
        session: REPLProtocol,
        nesting: Nesting,
        free: Callable[[], None],
        copied: Callable[[Callable[[], REPLProtocol]], REPLProtocol],
    ) -> None:
        """
        Args:
            session: the backend's session.
            nesting: the level of what its host functions open.
            free: gives the place back; may be called more than once.
            copied: makes what a function returns, a copy of the session, one of the pool's.
        """
        self._session = session
        self._nesting = nesting
        self._copied = copied
        self._free = weakref.finalize(self, free)  # a session that is dropped without `close` holds no place either
        self._free.atexit = False

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """What is opened while the guest has the turn belongs to the next level."""
        levels = self._nesting.levels
        token = levels.set({**levels.get(), self._nesting.pool: self._nesting.level})
        try:
            yield
        except SessionClosed:
            self._free()
            raise
        finally:
            levels.reset(token)

    @property
    def capabilities(self) -> Capabilities:
        """See `REPLProtocol`."""
        return self._session.capabilities

    @property
    def limits(self) -> Limits:
        """The session's limits."""
        return self._session.limits

    def exec(
        self,
        code: str,
        *,
        limits: Limits | None = None,
        read: tuple[str, ...] = (),
        on_output: Callable[[OutputChunk], None] | None = None,
    ) -> ExecResult:
        """See `REPLProtocol.exec`."""
        with self._inside():
            return self._session.exec(code, limits=limits, read=read, on_output=on_output)

    def get(self, name: str, default: Any = None) -> Any:
        """See `REPLProtocol.get`."""
        with self._inside():
            return self._session.get(name, default)

    def set(self, name: str, value: Any) -> None:
        """See `REPLProtocol.set`."""
        with self._inside():
            self._session.set(name, value)

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """See `REPLProtocol.bind`."""
        with self._inside():
            self._session.bind(name, target, inline=inline, errors=errors)

    def names(self) -> dict[str, str]:
        """See `REPLProtocol.names`."""
        with self._inside():
            return self._session.names()

    def interrupt(self) -> None:
        """See `REPLProtocol.interrupt`."""
        self._session.interrupt()

    def reset(self) -> None:
        """See `REPLProtocol.reset`."""
        with self._inside():
            self._session.reset()

    def close(self) -> None:
        """End the session and give its place in the pool back. Idempotent; never raises."""
        self._session.close()
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class _Forks(PooledSession):
    def fork(self) -> REPLProtocol:
        """See `SupportsFork.fork`. The copy takes a place in the pool. Raises `PoolTimeout` if there is none."""
        assert isinstance(self._session, SupportsFork)
        with self._inside():
            return self._copied(self._session.fork)


class _Checkpoints(PooledSession):
    def checkpoint(self) -> str:
        """See `SupportsCheckpoint.checkpoint`."""
        assert isinstance(self._session, SupportsCheckpoint)
        with self._inside():
            return self._session.checkpoint()

    def restore(self, checkpoint: str) -> None:
        """See `SupportsCheckpoint.restore`."""
        assert isinstance(self._session, SupportsCheckpoint)
        with self._inside():
            self._session.restore(checkpoint)


class _ReadsFiles(PooledSession):
    def read_file(self, name: str) -> bytes:
        """See `SupportsReadFile.read_file`."""
        assert isinstance(self._session, SupportsReadFile)
        with self._inside():
            return self._session.read_file(name)


@functools.cache
def _class_for(session_class: type) -> type[PooledSession]:
    """`PooledSession` with those of the optional methods that the backend's session has."""
    optional = (
        (SupportsFork, "fork", _Forks),
        (SupportsCheckpoint, "checkpoint", _Checkpoints),
        (SupportsReadFile, "read_file", _ReadsFiles),
    )
    bases = tuple(part for _, name, part in optional if hasattr(session_class, name))
    return type("PooledSession", bases, {}) if bases else PooledSession


def pooled(
    session: REPLProtocol,
    nesting: Nesting,
    free: Callable[[], None],
    copied: Callable[[Callable[[], REPLProtocol]], REPLProtocol],
) -> PooledSession:
    """``session`` as one of a pool's; see `PooledSession`."""
    return _class_for(type(session))(session, nesting, free, copied)
