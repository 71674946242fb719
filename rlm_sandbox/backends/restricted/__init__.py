"""The `restricted` backend: no isolation. Importing it imports RestrictedPython; the registry does so when a session is opened."""

from __future__ import annotations

from typing import Final

from .backend import RestrictedBackend

__all__ = ("BACKEND",)

BACKEND: Final = RestrictedBackend()
