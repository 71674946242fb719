"""`MemoryPressure`: whether memory is short on this machine, or in the control group that the host process is limited by."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

__all__ = ("MemoryPressure", "own_pressure")

#: Less than this share of all memory left, for programs that ask for it, is pressure; but at least and at most so many MiB.
_SHARE_LEFT: Final = 0.05
_LEAST_LEFT: Final = 64 << 20
_MOST_LEFT: Final = 256 << 20
_UNLIMITED: Final = 1 << 60
_FRESH_SECONDS: Final = 0.5
#: Files of a control group: limit, use, statistics, and the name there of file pages the kernel can drop at once.
_FILES: Final = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
)


class MemoryPressure:
    """Asked between a session's steps; a look costs some tens of microseconds. Where nothing can be read there is no pressure."""

    def __init__(self, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> None:
        self._meminfo = proc / "meminfo"
        self._last, self._look_at = False, 0.0
        self._groups = [folder for folder in _folders(proc, groups) if _limit(folder) is not None]

    def is_high(self) -> bool:
        """Whether so little is left that what can be done without should go."""
        return self._machine_is_short() or any(map(_is_short, self._groups))

    def was_high(self) -> bool:
        """The same as of the last half second, for whoever asks after every cell."""
        now = time.monotonic()
        if now >= self._look_at:
            self._last, self._look_at = self.is_high(), now + _FRESH_SECONDS
        return self._last

    def _machine_is_short(self) -> bool:
        try:
            lines = self._meminfo.read_text().splitlines()
            sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
            return sizes["MemAvailable"] * 1024 < _wanted(sizes["MemTotal"] * 1024)
        except (OSError, KeyError, ValueError, IndexError):
            return False


def _wanted(total: int) -> float:
    """Bytes that should be left of ``total``."""
    return min(max(_LEAST_LEFT, _SHARE_LEFT * total), _MOST_LEFT)


def _folders(proc: Path, groups: Path) -> list[Path]:
    """This process's control groups for memory and those above them."""
    found: list[Path] = []
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = groups / controllers
            folder = root / path.lstrip("/")
            found += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return found


def _limit(folder: Path) -> tuple[int, tuple[str, str, str, str]] | None:
    for files in _FILES:
        try:
            text = (folder / files[0]).read_text().strip()
            limit = int(text) if text.isdigit() else _UNLIMITED
        except OSError:
            continue
        return (limit, files) if limit < _UNLIMITED else None
    return None


def _is_short(folder: Path) -> bool:
    try:
        found = _limit(folder)
        if found is None:
            return False
        limit, (_, current, stat, inactive) = found
        used = int((folder / current).read_text())
        for line in (folder / stat).read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == inactive:
                used -= int(value)
        return limit - used < min(_wanted(limit), limit / 4)
    except (OSError, ValueError):
        return False


#: Of this process. A forked child is in the same groups.
_own: MemoryPressure | None = None


def own_pressure() -> MemoryPressure:
    """That of this process, looked up once."""
    global _own
    if _own is None:
        _own = MemoryPressure()
    return _own
