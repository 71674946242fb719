"""rlm_sandbox: the execution layer that makes Recursive Language Models safe and fast. See README.md."""

from __future__ import annotations

from .adapters import FakeAdapter, OpenAIAdapter
from .asynchronous import AsyncREPL
from .binding import Exposed, expose
from .context import Context, DataContext
from .errors import (
    BackendUnavailable,
    GuestCrashed,
    GuestError,
    InputRefused,
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
from .options import BackendOptions, DockerOptions, JailOptions, MontyOptions, RestrictedOptions, WasmOptions
from .orchestrator import RLM, AdapterError, Completion, LLMAdapter, Policy, PolicyExceeded, TokenUsage, Trace
from .pool import SessionPool
from .protocol import Capabilities, Feature, Grade, REPLProtocol, SupportsCheckpoint, SupportsFork, SupportsReadFile
from .registry import available, backend_names, open_repl
from .results import ExecResult, LimitHit, Opaque, OutputChunk, Usage
from .trajectory import JsonlWriter

__all__ = (
    "AdapterError",
    "AsyncREPL",
    "BackendOptions",
    "BackendUnavailable",
    "Capabilities",
    "Completion",
    "Context",
    "DataContext",
    "DockerOptions",
    "ExecResult",
    "Exposed",
    "FakeAdapter",
    "Feature",
    "Grade",
    "GuestCrashed",
    "GuestError",
    "InputRefused",
    "JailOptions",
    "JsonlWriter",
    "LLMAdapter",
    "LimitExceeded",
    "LimitHit",
    "Limits",
    "MontyOptions",
    "Opaque",
    "OpenAIAdapter",
    "OutputChunk",
    "Policy",
    "PolicyExceeded",
    "PoolTimeout",
    "ProtocolViolation",
    "REPLProtocol",
    "RLM",
    "RestrictedOptions",
    "SandboxError",
    "SessionBusy",
    "SessionClosed",
    "SessionPool",
    "SupportsCheckpoint",
    "SupportsFork",
    "SupportsReadFile",
    "TokenUsage",
    "Trace",
    "UnsendableValue",
    "UnsupportedLimit",
    "Usage",
    "WasmOptions",
    "available",
    "backend_names",
    "expose",
    "open_repl",
)
