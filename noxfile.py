"""Sessions beyond ``make test``: the tests without extras, and one backend's conformance on every Python.

Run with ``nox -s NAME``; ``nox`` itself is not a dependency of the project.
"""

from __future__ import annotations

import nox

PYTHONS = ["3.11", "3.12", "3.13"]
BACKENDS = ["docker", "jail", "monty", "restricted"]
TEST_TOOLS = ["hypothesis", "psutil", "pytest", "pytest-timeout"]

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules and its format."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, over the package, the tests and the benchmarks."""
    session.install("-e", ".[dev]")
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Everything, with every extra."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session(name="tests-no-extras", python=PYTHONS)
def tests_no_extras(session: nox.Session) -> None:
    """Everything, with no extra installed: nothing may need one at import."""
    session.install("-e", ".", *TEST_TOOLS)
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS)
@nox.parametrize("backend", BACKENDS)
def conformance(session: nox.Session, backend: str) -> None:
    """The contract's tests on one backend, which must be usable here."""
    extra = f"[{backend}]" if backend != "jail" else ""
    session.install("-e", f".{extra}", *TEST_TOOLS)
    session.run("pytest", "--backend", backend, "tests/conformance", *session.posargs, env={"RLM_SANDBOX_REQUIRE": backend})
