"""Runs first in a guest of its own: makes the policy importable there, and has the guest's session run cells through it.

Sent as source, in front of one call of `install`, which the session's setup runs in a namespace of its own.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.util
import linecache
import sys
import time
from typing import Any


class _Sources(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Modules from sources that came along. Their files are named as the runner's own, which tracebacks of cells leave out."""

    def __init__(self, sources: dict[str, str], place: str) -> None:
        self._sources = sources
        self._place = place

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname in self._sources else None

    def is_package(self, fullname: str) -> bool:
        return "." not in fullname

    def get_source(self, fullname: str) -> str:
        return self._sources[fullname]

    def get_code(self, fullname: str) -> Any:
        return compile(self._sources[fullname], f"{self._place}/{fullname.replace('.', '/')}.py", "exec", dont_inherit=True)


def install(sources: dict[str, str], setup: str, max_bytes: int, names: dict[str, Any]) -> None:
    """Install the policy on ``names``, the session's variables, and run ``setup`` under it."""
    session = builtins.session_names.__self__  # type: ignore[attr-defined]
    place = __file__.rpartition("/runners/")[0]
    sys.meta_path.insert(0, _Sources(sources, place))
    from rlm_policy.runtime import Policy  # type: ignore[import-not-found]

    def write(stream: str, text: str) -> None:
        getattr(sys, stream).write(text)

    def halt() -> None:
        raise KeyboardInterrupt

    policy = Policy(names, write=write, sleep=time.sleep, halt=halt, max_bytes=max_bytes)
    policy.builtins.update(session_names=session.summaries, HostCallError=builtins.HostCallError)  # type: ignore[attr-defined]

    def run_cell(source: str, name: str) -> Any:
        if name == "<rehearsal>":  # on nobody's names
            return policy.compile(source, name)[0]
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        return policy.run(source, name)

    session.run_cell = run_cell
    if setup:
        run_cell(setup, "<setup>")
