"""The context of a run: a long text that stays where it is. `view` has the algorithms, `source` the host's side."""

from __future__ import annotations

from .data import DataContext
from .source import CONTEXT_METHODS, CONTEXT_OPERATORS, Context, MemoryFile, WholeText

__all__ = ("CONTEXT_METHODS", "CONTEXT_OPERATORS", "Context", "DataContext", "MemoryFile", "WholeText")
