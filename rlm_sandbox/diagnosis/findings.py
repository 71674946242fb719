"""`Finding`: what one trial showed, what follows from it, and what to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

__all__ = ("Finding", "Status")


class Status(enum.StrEnum):
    """How a trial ended."""

    PASS = "PASS"  # noqa: S105 - no password
    #: It works, with less than there could be.
    CAUTION = "CAUTION"
    FAIL = "FAIL"
    #: Not tried, or nothing depends on it; ``found`` says which.
    SKIPPED = "SKIPPED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one trial.

    - ``backend``: whose it is; ``layer``: the mechanism or the ability that was tried.
    - ``found``: what was seen. It may hold text of the system or of a backend: whoever renders it makes it inert.
    - ``consequence``: one sentence: what that means for whoever opens a session.
    - ``remedy``: the command or the step that helps, empty where nothing is to be done.
    """

    backend: str
    layer: str
    status: Status
    found: str
    consequence: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """The fields by name, ready for JSON."""
        return {
            "backend": self.backend, "layer": self.layer, "status": self.status.value, "found": self.found,
            "consequence": self.consequence, "remedy": self.remedy,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Finding:
        """The inverse of `to_json`.

        Raises:
            KeyError, ValueError: ``data`` is something else.
        """
        return cls(
            backend=str(data["backend"]), layer=str(data["layer"]), status=Status(data["status"]), found=str(data["found"]),
            consequence=str(data["consequence"]), remedy=str(data["remedy"]),
        )  # fmt: skip
