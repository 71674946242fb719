"""What the tests of the docker backend share. They look from outside: through the engine's own API and the host's /proc."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlm_sandbox import BackendUnavailable, REPLProtocol, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import skip_unless_required

#: A loaded engine takes its time.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session")
def api() -> Iterator[Any]:
    """A client of the engine, which must work where it is required."""
    reason, remedy = "", ""
    try:
        state = load_backend("docker").probe()
        if not state.usable:
            reason, remedy = state.reason, state.remedy
    except BackendUnavailable as exc:
        reason, remedy = exc.reason, exc.remedy
    if reason:
        skip_unless_required("docker", f"backend docker is unavailable: {reason}; {remedy}")
    import docker

    client = docker.APIClient(version="auto")
    yield client
    client.close()


@pytest.fixture
def repl(api: Any) -> Iterator[REPLProtocol]:
    """A session with the default limits."""
    with open_repl("docker") as session:
        yield session


def ours(api: Any, owner: str) -> list[dict[str, Any]]:
    """The containers of one owner, running or not."""
    return list(api.containers(all=True, filters={"label": f"org.rlm-sandbox.owner={owner}"}))


def until(condition: Any, seconds: float = 20.0) -> None:
    """Wait for something that must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)
