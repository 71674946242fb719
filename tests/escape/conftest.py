"""Sessions of the jail for the escape tests, and what is watched from outside while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from rlm_sandbox import Limits, REPLProtocol, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from .outside import Listener, SessionProcesses

OpenJail = Callable[[Limits | None], REPLProtocol]
#: Small, so that every attack meets its limit soon.
SMALL = Limits(time_seconds=1.0, memory_mb=200, disk_mb=16, output_bytes=20_000)


@pytest.fixture(scope="session")
def _usable_jail() -> None:
    require_usable("jail", load_backend("jail").probe())


@pytest.fixture
def processes(_usable_jail: None) -> Iterator[SessionProcesses]:
    """The session's processes; none may be left when the sessions of the test are closed."""
    found = SessionProcesses()
    yield found
    found.assert_gone()


@pytest.fixture
def open_jail(processes: SessionProcesses) -> Iterator[OpenJail]:
    """Open sessions, by default with small limits."""
    opened: list[REPLProtocol] = []

    def open_one(limits: Limits | None = None) -> REPLProtocol:
        repl = open_repl("jail", limits=limits or SMALL)
        opened.append(repl)
        return repl

    yield open_one
    for repl in opened:
        repl.close()


@pytest.fixture
def repl(open_jail: OpenJail) -> REPLProtocol:
    """A session with small limits."""
    return open_jail(None)


@pytest.fixture
def listener() -> Iterator[Listener]:
    """A server of the host; the test fails if anybody reached it."""
    server = Listener()
    try:
        yield server
        server.assert_unreached()
    finally:
        server.close()
