"""What a process of a guest has used, asked of the kernel and never of the process. Linux."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

__all__ = ("cpu_seconds", "peak_memory_mb")

#: The clock of a process by its number, as clock_getcpuclockid(3) makes it: <linux/posix-timers.h>.
_CPUCLOCK_SCHED: Final = 2


def cpu_seconds(pid: int) -> float | None:
    """Seconds of processor time of all its threads so far; None if it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        return None


def peak_memory_mb(pid: int) -> float | None:
    """The peak of its resident memory, in MiB; None if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
