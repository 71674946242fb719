"""The grades of a backend whose guest is bounded from outside in every respect."""

from __future__ import annotations

from typing import Final, TypedDict

from ..protocol import Grade

__all__ = ("ALL_HARD", "Grades")


class Grades(TypedDict):
    """The graded fields of `Capabilities`."""

    time_seconds: Grade
    wall_seconds: Grade
    output_bytes: Grade
    host_calls: Grade
    value_bytes: Grade
    memory_mb: Grade
    processes: Grade
    disk_mb: Grade
    session_seconds: Grade
    network: Grade
    crash: Grade
    interrupt: Grade


#: A backend that cannot say this writes its own list: a grade is never left to a default.
ALL_HARD: Final[Grades] = {
    "time_seconds": Grade.HARD,
    "wall_seconds": Grade.HARD,
    "output_bytes": Grade.HARD,
    "host_calls": Grade.HARD,
    "value_bytes": Grade.HARD,
    "memory_mb": Grade.HARD,
    "processes": Grade.HARD,
    "disk_mb": Grade.HARD,
    "session_seconds": Grade.HARD,
    "network": Grade.HARD,
    "crash": Grade.HARD,
    "interrupt": Grade.HARD,
}
