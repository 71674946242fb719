"""The ``wasm`` backend: CPython as a WebAssembly component, in this process. Needs no feature of the kernel."""

from __future__ import annotations

from .backend import BACKEND

__all__ = ("BACKEND",)
