"""``rlm-sandbox doctor``: what works on this machine, what follows, and what to do. Every line of it has been tried."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .console import inert, one_line
from .diagnosis import Finding, Status
from .diagnosis.child import LAYERS, SESSIONS, choose_auto, examine
from .registry import backend_names

__all__ = ("SCHEMA_VERSION", "Diagnosis", "diagnose", "render")

#: Raised when a reader of the older form could misread the JSON.
SCHEMA_VERSION: Final = 1
#: Backends with layers of their own to try, and where; every other has its sessions tried, and that is all there is to it.
_WITH_LAYERS: Final = {"jail": ("linux",), "wasm": ("linux", "darwin", "win32")}
#: Columns where there is no terminal to fit into.
_PLAIN_WIDTH: Final = 132
_MAX_TEXT: Final = 400
_STYLES: Final = {
    Status.PASS: "green", Status.CAUTION: "bold yellow", Status.FAIL: "bold red", Status.SKIPPED: "dim",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found. ``auto`` is the backend that ``auto`` opens here, or None; then ``auto_error`` says why."""

    findings: tuple[Finding, ...]
    auto: str | None
    auto_error: str

    @property
    def usable(self) -> bool:
        """True if ``auto`` opens a backend here of which nothing failed."""
        return self.auto is not None and not self.failed(self.auto)

    def failed(self, backend: str) -> bool:
        """True if something of ``backend`` failed."""
        return any(item.backend == backend and item.status is Status.FAIL for item in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for JSON. Field names are stable."""
        return {
            "schema": SCHEMA_VERSION, "usable": self.usable, "auto": self.auto, "auto_error": self.auto_error or None,
            "system": system_facts(), "findings": [item.to_json() for item in self.findings],
        }  # fmt: skip


def system_facts() -> dict[str, str]:
    """What a report of a problem needs to say."""
    uid = os.geteuid() if hasattr(os, "geteuid") else -1
    return {
        "rlm_sandbox": version("rlm-sandbox"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "user": "root" if uid == 0 else "ordinary user",
    }


def diagnose(progress: Callable[[str], None] = lambda _what: None) -> Diagnosis:
    """Try every backend and every layer, in processes of their own; takes a few seconds. ``progress`` hears what is tried."""
    findings: list[Finding] = []
    for name in backend_names():
        progress(name)
        layers = examine(name, LAYERS) if sys.platform in _WITH_LAYERS.get(name, ()) else []
        broken = next((item for item in layers if item.status is Status.FAIL), None)
        findings += layers
        for item in examine(name, SESSIONS):
            # A session that cannot be opened for want of a layer needs that layer's remedy, which is the more exact one.
            findings.append(replace(item, remedy=broken.remedy) if broken and item.remedy else item)
    progress("auto")
    auto, error = choose_auto()
    return Diagnosis(findings=tuple(findings), auto=auto, auto_error=error)


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Show it: a table for each backend, then what to do, then whether ``auto`` works."""
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    facts = system_facts()
    _line(console, f"rlm-sandbox {facts['rlm_sandbox']}, {facts['python']}, {facts['system']}, {facts['user']}", "dim")
    for name in dict.fromkeys(item.backend for item in diagnosis.findings):
        console.print()
        table = Table(box=box.SIMPLE_HEAD, title=name, title_justify="left", title_style="bold", expand=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("layer", no_wrap=True)
        table.add_column("found", ratio=2, overflow="fold")
        table.add_column("consequence", ratio=3, overflow="fold")
        for item in diagnosis.findings:
            if item.backend == name:
                table.add_row(
                    Text(item.status.value, _STYLES[item.status]), *map(_cell, (item.layer, item.found, item.consequence))
                )
        console.print(table)
    _what_to_do(diagnosis, console)
    if diagnosis.usable:
        _line(console, f"auto opens {diagnosis.auto}.", "bold green")
    elif diagnosis.auto is not None:
        _line(console, f"auto opens {diagnosis.auto}, of which something failed: do not rely on it.", "bold red")
    else:
        _line(console, f"auto has no usable backend: {one_line(diagnosis.auto_error, 1_000)}", "bold red")


def _what_to_do(diagnosis: Diagnosis, console: Console) -> None:
    """Each remedy once, with the places it is for."""
    places: dict[str, list[str]] = {}
    for item in diagnosis.findings:
        if item.remedy:
            places.setdefault(item.remedy, []).append(f"{item.backend}, {item.layer}")
    if not places:
        return
    _line(console, "What to do", "bold")
    for remedy, where in places.items():
        # On one line, however long: it is there to be copied.
        _line(console, f"  {one_line(remedy, _MAX_TEXT)}")
        _line(console, f"    for {one_line('; '.join(where), _MAX_TEXT)}", "dim")
    console.print()


def _cell(text: str) -> Text:
    return Text(one_line(text, _MAX_TEXT))


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(inert(text), style), soft_wrap=True)
