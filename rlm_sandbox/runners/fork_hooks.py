"""What the standard library does in a forked child, left out where there is nothing to do.

`threading`, `logging` and `concurrent.futures` make their locks anew in each child and forget the threads it does not have. For a
process that had one thread when it forked that changes nothing; but it runs some 40 functions, which write to 100 pages that the
child would else share, and takes 0.4 ms: in the supervisor, the worker and the standby of every session.
"""

from __future__ import annotations

import _thread
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ("lean_fork_hooks",)

_Hook = Callable[[], Any]
#: Whose hooks are about threads only. Others are not looked at: `random`, say, seeds itself anew.
_ABOUT_THREADS: Final = ("threading", "logging", "concurrent.futures.thread")


class _Threads:
    """How many there were beside the main thread when this process was last forked; a child has what its parent found."""

    def __init__(self) -> None:
        self._others = 0

    def count(self) -> None:
        """Before a fork."""
        self._others = _thread._count()

    def child_hook(self, child: _Hook, parent: _Hook | None) -> _Hook:
        """``child`` if there were others; else what the parent does: it lets go of what was taken before the fork."""

        def after_in_child() -> None:
            if self._others:
                child()
            elif parent is not None:
                parent()

        return after_in_child


@contextmanager
def lean_fork_hooks() -> Iterator[None]:
    """What those modules register while this is in force is done only after a fork that needs it: import them in here."""
    register = os.register_at_fork
    threads = _Threads()

    def lean_register(
        *, before: _Hook | None = None, after_in_child: _Hook | None = None, after_in_parent: _Hook | None = None
    ) -> None:
        hooks = {"before": before, "after_in_child": after_in_child, "after_in_parent": after_in_parent}
        if after_in_child is not None and _caller() in _ABOUT_THREADS and (before is None) is (after_in_parent is None):
            hooks["after_in_child"] = threads.child_hook(after_in_child, after_in_parent)
        register(**{name: hook for name, hook in hooks.items() if hook is not None})

    os.register_at_fork = lean_register
    try:
        yield
    finally:
        os.register_at_fork = register
        # Last, so that it is the first to run before a fork.
        register(before=threads.count)


def _caller() -> str:
    """The module that registers hooks, by its own name."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))
