"""`Watchdog`: every deadline of one turn, as pure arithmetic on a clock. It decides; the turn acts.

The turn clock runs while the guest holds the turn, sleep included. While the host holds it (host calls), only CPU that
other guest threads burn is added. After a hit the guest has a grace to end by itself; then it is killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ..limits import Limits
from ..results import LimitHit

__all__ = ("GRACE_SECONDS", "Verdict", "Watchdog")

#: Between the soft interrupt and the kill.
GRACE_SECONDS: Final = 0.25
#: How often CPU burnt during host calls is looked at.
_CPU_CHECK_SECONDS: Final = 0.05

Verdict = Literal["go_on", "interrupt", "kill"]


@dataclass(slots=True)
class Watchdog:
    """Deadlines of one turn. Times are seconds of a monotonic clock; ``cpu`` is the guest's CPU clock or None.

    ``session_until``: when ``session_seconds`` is over, or None. ``soft``: a soft interrupt exists.
    """

    limits: Limits
    started: float
    session_until: float | None = None
    soft: bool = True
    _used: float = 0.0
    _running_since: float | None = None
    _cpu_at_suspend: float | None = None
    _kill_at: float | None = None
    hit: LimitHit | None = None

    def guest_turn(self, now: float, cpu: float | None) -> None:
        """The guest holds the turn from now on."""
        self._used += self._cpu_since_suspend(cpu)
        self._cpu_at_suspend = None
        self._running_since = now

    def host_turn(self, now: float, cpu: float | None) -> None:
        """The host holds the turn from now on: the clock stops."""
        self._used = self.turn_seconds(now, None)
        self._running_since = None
        self._cpu_at_suspend = cpu

    def _cpu_since_suspend(self, cpu: float | None) -> float:
        if cpu is None or self._cpu_at_suspend is None:
            return 0.0
        return max(0.0, cpu - self._cpu_at_suspend)

    def turn_seconds(self, now: float, cpu: float | None) -> float:
        """The turn clock."""
        if self._running_since is not None:
            return self._used + now - self._running_since
        return self._used + self._cpu_since_suspend(cpu)

    def end(self, now: float, hit: LimitHit | None = None) -> Verdict:
        """Something ends the cell from outside: a limit, or an interrupt (no hit). The first reason stands."""
        if self._kill_at is not None:
            return "go_on"
        self.hit = hit
        self._kill_at = now + GRACE_SECONDS if self.soft else now
        return "interrupt" if self.soft else "kill"

    @property
    def counts_cpu(self) -> bool:
        """True while the guest's CPU clock matters: the host holds the turn, and had a reading when it took it."""
        return self._cpu_at_suspend is not None

    @property
    def ending(self) -> bool:
        """True once something ends the cell from outside."""
        return self._kill_at is not None

    def wait_seconds(self, now: float) -> float | None:
        """How long nothing can happen by time alone, None for ever."""
        if self._kill_at is not None:
            return max(0.0, self._kill_at - now)
        earliest = self.session_until
        if self.limits.time_seconds is not None:
            due = None
            if self._running_since is not None:
                due = self._running_since + self.limits.time_seconds - self._used
            elif self._cpu_at_suspend is not None:
                due = now + _CPU_CHECK_SECONDS
            if due is not None and (earliest is None or due < earliest):
                earliest = due
        if self.limits.wall_seconds is not None:
            due = self.started + self.limits.wall_seconds
            if earliest is None or due < earliest:
                earliest = due
        return None if earliest is None else max(0.0, earliest - now)

    def check(self, now: float, cpu: float | None) -> Verdict:
        """What to do now."""
        if self._kill_at is not None:
            return "kill" if now >= self._kill_at else "go_on"
        used = self.turn_seconds(now, cpu)
        if self.limits.time_seconds is not None and used >= self.limits.time_seconds:
            return self.end(now, LimitHit("time_seconds", self.limits.time_seconds, round(used, 3), "host"))
        wall = now - self.started
        if self.limits.wall_seconds is not None and wall >= self.limits.wall_seconds:
            return self.end(now, LimitHit("wall_seconds", self.limits.wall_seconds, round(wall, 3), "host"))
        if self.session_until is not None and now >= self.session_until:
            return self.end(now, LimitHit("session_seconds", self.limits.session_seconds or 0.0, None, "host"))
        return "go_on"
