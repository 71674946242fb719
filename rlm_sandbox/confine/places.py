"""Where things are inside the guest's tree: paths that say nothing of the host."""

from __future__ import annotations

import sys
from typing import Final

__all__ = ("GUEST_ARCHIVE", "GUEST_INPUT", "GUEST_PACKAGES", "GUEST_PYTHON", "GUEST_STDLIB")

GUEST_PYTHON: Final = "/usr/bin/python3"
GUEST_STDLIB: Final = f"/usr/{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}"
GUEST_ARCHIVE: Final = "/usr/lib/rlm_guest.zip"
#: Packages of the host's environment, if the session was opened with some.
GUEST_PACKAGES: Final = "/usr/lib/packages"
#: Where a session's input files are mounted.
GUEST_INPUT: Final = "/input"
