"""rlm_sandbox: the execution layer that makes Recursive Language Models safe and fast. See README.md."""

from __future__ import annotations

from .binding import Exposed, expose
from .context import Context
from .errors import (
    BackendUnavailable,
    GuestCrashed,
    GuestError,
    LimitExceeded,
    PoolTimeout,
    ProtocolViolation,
    SandboxError,
    SessionBusy,
    SessionClosed,
    UnsendableValue,
    UnsupportedLimit,
)
from .limits import Limits
from .options import BackendOptions, JailOptions, MontyOptions
from .protocol import Capabilities, Feature, Grade, REPLProtocol, SupportsCheckpoint, SupportsFork, SupportsReadFile
from .registry import available, backend_names, open_repl
from .results import ExecResult, LimitHit, Opaque, OutputChunk, Usage

__all__ = (
    "BackendOptions",
    "BackendUnavailable",
    "Capabilities",
    "Context",
    "ExecResult",
    "Exposed",
    "Feature",
    "Grade",
    "GuestCrashed",
    "GuestError",
    "JailOptions",
    "LimitExceeded",
    "LimitHit",
    "Limits",
    "MontyOptions",
    "Opaque",
    "OutputChunk",
    "PoolTimeout",
    "ProtocolViolation",
    "REPLProtocol",
    "SandboxError",
    "SessionBusy",
    "SessionClosed",
    "SupportsCheckpoint",
    "SupportsFork",
    "SupportsReadFile",
    "UnsendableValue",
    "UnsupportedLimit",
    "Usage",
    "available",
    "backend_names",
    "expose",
    "open_repl",
)
