"""The ``jail`` backend: a Linux process in namespaces of its own, behind seccomp, with a standby to survive its death."""

from __future__ import annotations

from .backend import BACKEND

__all__ = ("BACKEND",)
