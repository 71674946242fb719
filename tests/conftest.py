"""The `backend` fixture over the registry, and what makes a declared gap that has closed fail the run."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NoReturn, Protocol

import pytest
from hypothesis import HealthCheck, settings

from rlm_sandbox import (
    BackendUnavailable,
    Capabilities,
    Feature,
    Grade,
    Limits,
    REPLProtocol,
    RestrictedOptions,
    available,
    backend_names,
    open_repl,
)
from rlm_sandbox.limits import PER_CELL, PER_SESSION
from rlm_sandbox.options import BackendOptions, DockerOptions
from rlm_sandbox.registry import Availability, SessionConfig, load_backend

REQUIRE = "RLM_SANDBOX_REQUIRE"
#: A test of the contract that takes longer hangs; the time-out of pyproject.toml is for the rest.
TIMEOUT_SECONDS = 60
#: Options of a backend under which it is another thing, and passes the tests of the contract once more.
VARIANTS: dict[str, tuple[str, BackendOptions | None]] = {
    **{name: (name, None) for name in backend_names()},
    "docker-attached": ("docker", DockerOptions(channel="attached")),
    "docker-runsc": ("docker", DockerOptions(runtime="runsc")),
    "restricted-process": ("restricted", RestrictedOptions(process=True)),
    "restricted-plain": ("restricted", RestrictedOptions(process="plain")),
}


class OpenSession(Protocol):
    """The `open_session` fixture: `open_repl` on the backend under test, closed when the test ends."""

    def __call__(self, *, limits: Limits | None = None, setup: str = "", recovery: bool = True) -> REPLProtocol: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run the tests of the contract on this backend only; may be repeated (default: every backend of the registry, and "
        "docker-attached (by the attached stream), docker-runsc (gVisor), restricted-process and restricted-plain)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "needs(*features): the test passes on a backend that declares every feature and must fail on one that does not",
    )
    config.addinivalue_line(
        "markers", "only_if(predicate, reason): skip on a backend whose capabilities do not satisfy the predicate"
    )
    # What a shell runs in the background starts with Ctrl-C ignored; it is tested there, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long examples take says nothing about what they show, and on a loaded machine fails what is right.
    settings.register_profile("rlm_sandbox", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("rlm_sandbox")
    unknown = [name for name in config.getoption("--backend") if name not in VARIANTS]
    if unknown:
        raise pytest.UsageError(f"--backend: there is no {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [
        f"rlm_sandbox {version('rlm-sandbox')} on Python {platform.python_version()}, {platform.system()} {platform.release()}"
    ]
    try:
        found = available()
    except Exception as exc:  # a backend that cannot be imported fails its own tests; the header must not hide them all
        return [*lines, f"backends: {type(exc).__name__}: {exc}"]
    for name, state in found.items():
        lines.append(f"backend {name}: {'usable' if state.usable else f'unavailable: {state.reason}; {state.remedy}'}")
    required = os.environ.get(REQUIRE)
    if required:
        lines.append(f"{REQUIRE}: {required}")
    return lines


def is_required(name: str) -> bool:
    asked = {part.strip() for part in os.environ.get(REQUIRE, "").split(",")}
    return name in asked or "all" in asked


def skip_unless_required(name: str, message: str) -> NoReturn:
    """Skip the test; fail it where the environment requires what ``name`` says."""
    if is_required(name):
        pytest.fail(f"{message} ({REQUIRE} names {name})")
    pytest.skip(message)


def require_usable(name: str, state: Availability) -> None:
    """Skip where a backend does not work, with the reason; fail where the environment requires it."""
    if not state.usable:
        skip_unless_required(name, f"backend {name} is unavailable: {state.reason}; {state.remedy}")


def open_variant(
    name: str,
    *,
    limits: Limits | None = None,
    accept: Grade = Grade.HARD,
    trusted: bool = False,
    setup: str = "",
    recovery: bool = True,
) -> REPLProtocol:
    """`open_repl` on a backend, or a variant of one."""
    backend, options = VARIANTS[name]
    return open_repl(backend, limits=limits, accept=accept, trusted=trusted, setup=setup, recovery=recovery, options=options)


def declared_by(name: str, *, limits: Limits | None = None, setup: str = "", recovery: bool = True) -> Capabilities:
    """What such a session declares."""
    backend, options = VARIANTS[name]
    chosen = limits if limits is not None else Limits()
    return load_backend(backend).capabilities(SessionConfig(limits=chosen, setup=setup, recovery=recovery, options=options))


def variant_state(name: str) -> Availability:
    """Whether a backend, or a variant of one, works here."""
    backend, options = VARIANTS[name]
    try:
        return load_backend(backend).probe(options)
    except BackendUnavailable as exc:
        return Availability(False, exc.reason, exc.remedy)


_capabilities: dict[str, Capabilities | None] = {}


def _declared(name: str) -> Capabilities | None:
    """What the backend declares, or None where it does not work (its tests then skip or fail by themselves)."""
    if name not in _capabilities:
        try:
            found = variant_state(name).usable
            _capabilities[name] = declared_by(name) if found else None
        except Exception:  # the `backend` fixture meets the same error and reports it
            _capabilities[name] = None
    return _capabilities[name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backend") or VARIANTS
        metafunc.parametrize("backend", list(dict.fromkeys(names)), indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turn ``needs`` and ``only_if`` into what pytest knows, by what the backend of each test declares."""
    for item in items:
        params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "backend" in params and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))
        capabilities = _declared(params["backend"]) if "backend" in params else None
        if capabilities is None:
            continue
        missing = [
            feature.value
            for mark in item.iter_markers("needs")
            for feature in mark.args
            if isinstance(feature, Feature) and not capabilities.has(feature)
        ]
        if missing:
            # Only a failed assertion counts as the gap showing; a time-out or a host exception is still an error.
            # Always strict: a test that a subset of Python passes all the same is marked too coarsely; mark it better.
            reason = f"{capabilities.backend} does not declare {', '.join(missing)}"
            item.add_marker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
        for mark in item.iter_markers("only_if"):
            predicate, reason = mark.args
            if not predicate(capabilities):
                item.add_marker(pytest.mark.skip(reason=f"{capabilities.backend}: {reason}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What a backend makes once (compiled code, a copy of Python) is made now, and not in the time of the first test that uses it."""
    for name in backend_names():
        if any(name in item.nodeid for item in session.items):
            _declared(name)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a usable backend, or of a variant."""
    name: str = request.param
    state = variant_state(name)
    require_usable(VARIANTS[name][0], state)
    return name


@pytest.fixture
def capabilities(backend: str) -> Capabilities:
    """What the backend under test declares."""
    return declared_by(backend)


def lowest_grade(capabilities: Capabilities, limits: Limits) -> Grade:
    """The grade that has to be accepted to open a session with ``limits``."""
    asked = [name for name in (*PER_CELL, *PER_SESSION) if getattr(limits, name) is not None]
    return min((capabilities.grade(name) for name in asked), default=Grade.HARD)


@pytest.fixture
def open_session(backend: str) -> Iterator[OpenSession]:
    """Open sessions on the backend, accepting no less than it declares; they are closed at the end of the test."""
    opened: list[REPLProtocol] = []

    def open_one(*, limits: Limits | None = None, setup: str = "", recovery: bool = True) -> REPLProtocol:
        chosen = limits if limits is not None else Limits()
        accept = lowest_grade(declared_by(backend, limits=chosen, setup=setup, recovery=recovery), chosen)
        # Crash and interrupt are graded too: below HARD in either, trusted=True has to be said.
        repl = open_variant(backend, limits=chosen, accept=accept, trusted=True, setup=setup, recovery=recovery)
        opened.append(repl)
        return repl

    yield open_one
    for repl in opened:
        repl.close()


@pytest.fixture
def repl(open_session: OpenSession) -> REPLProtocol:
    """A session with the default limits."""
    return open_session()
