"""Room for the standby: a cell may leave as many threads as it is allowed to, and its worker must still be able to fork."""

from __future__ import annotations

import resource

__all__ = ("allow_tasks",)


def allow_tasks(pids: tuple[int, ...], more: int) -> None:
    """Set the limit on tasks of these processes to the supervisor's own, plus ``more``. A guest cannot move it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    for pid in pids:
        try:
            resource.prlimit(pid, resource.RLIMIT_NPROC, (wanted, hard))
        except ProcessLookupError:
            pass  # it has just ended, which is found out by its handle
