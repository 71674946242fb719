"""Trials of a whole backend, whichever it is: load it, open a session, run a cell, kill one, ask for too much memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from ..errors import BackendUnavailable, SandboxError
from ..limits import PER_CELL, PER_SESSION, Limits
from ..protocol import Capabilities, Grade, REPLProtocol
from ..registry import SessionConfig, load_backend, open_repl
from .findings import Finding, Status

__all__ = ("examine_auto", "examine_backend")

_LIMITS: Final = Limits(time_seconds=10.0, wall_seconds=20.0, memory_mb=128, disk_mb=8, session_seconds=60.0)
#: How long the cell that has to be killed may run.
_KILL_SECONDS: Final = 0.5
#: One call without an end in sight: where the backend interrupts before it kills, this cell has to be killed.
_OBSTINATE: Final = "kept = 0\nsum(range(10 ** 13))"
#: 2 GiB of references on a 64-bit machine, against 128 MiB allowed. In every backend's subset of Python.
_TOO_MUCH: Final = "big = [0] * 268435456"
_DOCTOR: Final = "run: rlm-sandbox doctor"


class _Examination:
    """The trials of one backend, each a finding; the first that fails ends them."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def _found(self, layer: str, status: Status, found: str, consequence: str, remedy: str = "") -> Finding:
        return Finding(backend=self.backend, layer=layer, status=status, found=found, consequence=consequence, remedy=remedy)

    def run(self) -> Iterator[Finding]:
        no_session = f"No session of {self.backend} can be opened."
        try:
            backend = load_backend(self.backend)
        except BackendUnavailable as exc:
            yield self._found("package", Status.FAIL, exc.reason, no_session, exc.remedy)
            return
        except ImportError as exc:
            found = f"importing it failed ({exc.name or type(exc).__name__})"
            yield self._found("package", Status.FAIL, found, no_session, f"run: pip install 'rlm-sandbox[{self.backend}]'")
            return
        yield self._found("package", Status.PASS, "it can be imported", "The backend is installed.")
        started = time.monotonic()
        available = backend.probe()
        if not available.usable:
            yield self._found("start", Status.FAIL, available.reason, no_session, _not_ourselves(available.remedy))
            return
        yield self._found("start", Status.PASS, f"in {_ms(started)}", "Its processes start here.")
        capabilities = backend.capabilities(SessionConfig(limits=_LIMITS))
        started = time.monotonic()
        try:
            session = open_repl(self.backend, limits=_LIMITS, accept=_lowest(capabilities), trusted=True)
        except SandboxError as exc:
            remedy = _not_ourselves(exc.remedy) if isinstance(exc, BackendUnavailable) else ""
            yield self._found("session", Status.FAIL, str(exc), no_session, remedy)
            return
        with session:
            yield self._found("session", Status.PASS, f"opened in {_ms(started)}", "Sessions can be opened.")
            yield from self._cells(session, capabilities)
        yield self._grades(capabilities)

    def _cells(self, session: REPLProtocol, capabilities: Capabilities) -> Iterator[Finding]:
        started = time.monotonic()
        result = session.exec("kept = 6 * 7\nkept")
        if (result.outcome, result.value) != ("ok", "42"):
            found = f"6 * 7 came to {result.outcome} {result.value!r} {result.error or ''}"
            yield self._found("cell", Status.FAIL, found, "Code does not run as it should.", "report this as a bug")
            return
        yield self._found("cell", Status.PASS, f"ran in {_ms(started)}", "Code runs.")
        if capabilities.time_seconds is Grade.NONE:
            yield self._found("kill", Status.SKIPPED, "not tried: it enforces no time limit", "A cell may run for ever.")
        else:
            yield self._killed(session, capabilities)
        if capabilities.memory_mb is Grade.NONE:
            yield self._found("memory", Status.SKIPPED, "not tried: it enforces no memory limit", "A cell may take all memory.")
        else:
            yield self._memory(session)

    def _killed(self, session: REPLProtocol, capabilities: Capabilities) -> Finding:
        started = time.monotonic()
        result = session.exec(_OBSTINATE, limits=replace(_LIMITS, time_seconds=_KILL_SECONDS))
        took = _ms(started)
        after = session.exec("kept")
        if result.outcome != "limit":
            found = f"an endless call came to {result.outcome}"
            return self._found("kill", Status.FAIL, found, "A cell is not stopped at its limits.", "report this as a bug")
        found = f"an endless call with {_KILL_SECONDS:g} s ended after {took}, state {result.state}"
        # Kept: what the cell assigned is there. Restored: as before the cell.
        if after.value == {"kept": "0", "restored": "42"}.get(result.state):
            return self._found("kill", Status.PASS, found, "A cell that is stopped costs only itself.")
        if capabilities.recovery == "none" and result.state == "lost":
            return self._found("kill", Status.CAUTION, found, "A cell that is stopped costs the session its variables.")
        found = f"{found}, and then the variable is {after.value or after.error}"
        return self._found("kill", Status.FAIL, found, "A cell that is stopped costs more than itself.", "report this as a bug")

    def _memory(self, session: REPLProtocol) -> Finding:
        result = session.exec(_TOO_MUCH)
        after = session.exec("1 + 1")
        if result.outcome == "ok" or after.value != "2":
            found = f"a list of 2 GiB came to {result.outcome}, the next cell to {after.outcome}"
            return self._found("memory", Status.FAIL, found, "memory_mb does not hold.", _DOCTOR)
        seen = result.outcome if result.limit is None else f"the {result.limit.kind} limit"
        found = f"a list of 2 GiB in {_LIMITS.memory_mb} MiB came to {seen}; the next cell ran"
        return self._found("memory", Status.PASS, found, "memory_mb holds.")

    def _grades(self, capabilities: Capabilities) -> Finding:
        below = [
            f"{name} ({capabilities.grade(name).name})"
            for name in (*PER_CELL, *PER_SESSION, "crash", "interrupt")
            if capabilities.grade(name) < Grade.HARD
        ]
        if not below:
            consequence = "Every limit is enforced from outside the code it holds for."
            return self._found("limits", Status.PASS, "all of them HARD", consequence)
        return self._found(
            "limits", Status.CAUTION, ", ".join(below), f"Code that is not trusted may overrun these limits; isolation: {capabilities.isolation}.",
            "say accept= and trusted=True for trusted code only, or use another backend",
        )  # fmt: skip


def examine_backend(name: str) -> Iterator[Finding]:
    """Try a backend of the registry."""
    return _Examination(name).run()


def examine_auto() -> str:
    """Open a session on ``auto`` and run a cell in it. Returns the backend it chose.

    Raises:
        SandboxError: there is none, in one sentence.
    """
    with open_repl("auto", limits=_LIMITS) as session:
        if session.exec("6 * 7").value != "42":
            raise SandboxError(f"backend {session.capabilities.backend!r} does not compute as it should; report this as a bug")
        return session.capabilities.backend


def _lowest(capabilities: Capabilities) -> Grade:
    return min(capabilities.grade(name) for name in (*PER_CELL, *PER_SESSION))


def _not_ourselves(remedy: str) -> str:
    """The remedy, unless it is to run this very examination: then the layer that failed has a better one."""
    return "see the layers above" if remedy == _DOCTOR else remedy


def _ms(started: float) -> str:
    return f"{(time.monotonic() - started) * 1000:.0f} ms"
