"""The `monty` backend. Importing it imports the engine; the registry does so when a session is opened."""

from __future__ import annotations

from typing import Final

from .backend import MontyBackend

__all__ = ("BACKEND",)

BACKEND: Final = MontyBackend()
