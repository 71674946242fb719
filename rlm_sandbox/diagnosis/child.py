"""The throw-away process of an examination, from both sides: what it runs, and how it is started, read and ended.

It prints one JSON line for each finding as it comes, so that one that hangs or dies loses only what was still to be tried.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..errors import BackendUnavailable, SandboxError
from .findings import Finding, Status

__all__ = ("choose_auto", "examine", "main")

#: All trials of one kind together. A backend that pulls an image or reaches a service may take most of it.
EXAMINATION_SECONDS: Final = 90.0
#: ``-P``: no module is taken from the directory the command happens to run in. The package's own is appended, for a
#: checkout that is not installed.
_START: Final = "import sys; sys.path.append(sys.argv.pop(1)); from rlm_sandbox.diagnosis.child import main; main(*sys.argv[1:])"
_PARENT: Final = Path(__file__).resolve().parents[2]

LAYERS, SESSIONS, AUTO = "layers", "sessions", "auto"


def main(kind: str, backend: str = "") -> None:
    """Run one examination and print what it finds."""
    if kind == AUTO:
        from .sessions import examine_auto

        try:
            print(json.dumps({"auto": examine_auto(), "error": None}))
        except BackendUnavailable as exc:
            print(json.dumps({"auto": None, "error": exc.reason}))
        except SandboxError as exc:
            print(json.dumps({"auto": None, "error": str(exc)}))
        return
    for finding in _findings(kind, backend):
        print(json.dumps(finding.to_json()), flush=True)


def _findings(kind: str, backend: str) -> Iterator[Finding]:
    if kind == LAYERS and backend == "jail":
        from .jail_layers import examine_layers

        return examine_layers()
    if kind == LAYERS:
        from .parts import examine_parts

        return examine_parts(backend)
    from .sessions import examine_backend

    return examine_backend(backend)


def _run(*arguments: str, seconds: float) -> tuple[list[str], str]:
    """The lines a child printed, and why it printed no more: empty if it ended as it should."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", _START, str(_PARENT), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    why = ""
    try:
        said, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(child)
        said, _ = child.communicate()
        why = f"it did not end within {seconds:g} s"
    except BaseException:
        _kill(child)
        child.communicate()
        raise
    if not why and child.returncode:
        why = f"the process that tried it ended with status {child.returncode}"
    return said.decode("utf-8", "replace").splitlines(), why


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child and what it started; the pipe does not close before they are gone."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (OSError, AttributeError):  # it has ended; or this system has no process groups
        child.kill()


def examine(backend: str, kind: str, *, seconds: float = EXAMINATION_SECONDS) -> list[Finding]:
    """What a child found out about a backend: its ``layers`` or its ``sessions``."""
    lines, why = _run(kind, backend, seconds=seconds)
    found: list[Finding] = []
    for line in lines:
        try:
            found.append(Finding.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            why = why or "it printed what is no finding"
    if why:
        last = f"; the last that was tried with an end: {found[-1].layer}" if found else ""
        found.append(
            Finding(
                backend=backend, layer=kind, status=Status.FAIL, found=f"{why}{last}",
                consequence="This backend cannot be relied on here.", remedy="use another backend, and report this as a bug",
            )
        )  # fmt: skip
    return found


def choose_auto(*, seconds: float = EXAMINATION_SECONDS) -> tuple[str | None, str]:
    """The backend that ``auto`` opens here, or None and why there is none."""
    lines, why = _run(AUTO, seconds=seconds)
    try:
        said = json.loads(lines[-1])
        return said["auto"], str(said["error"] or "")
    except (LookupError, ValueError, TypeError):
        return None, why or "no backend could be tried"
