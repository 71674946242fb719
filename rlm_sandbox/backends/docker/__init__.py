"""The ``docker`` backend: a container from the runner image, every hardening flag on, by way of a Docker engine's API."""

from __future__ import annotations

from .backend import BACKEND

__all__ = ("BACKEND",)
