"""Telling a zygote's spare from a session's processes: it is nobody's, and comes and goes by itself."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ("is_spare", "living")


def is_spare(process: psutil.Process) -> bool:
    """Whether it is a zygote's child that has no system-call filter yet: no session's process runs a cell without one."""
    parent = process.parent()
    if parent is None or "zygote" not in parent.cmdline():
        return False
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return "Seccomp:\t0" in status


def living(above: psutil.Process) -> list[psutil.Process]:
    """The processes below one that run, sleep or are stopped, without spares."""
    found = []
    for process in above.children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and not is_spare(process):
                found.append(process)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
    return found
