"""The RLM loop over the contract. It names no backend and no model provider."""

from __future__ import annotations

from .events import (
    AnswerRejected,
    BatchFinished,
    BatchStarted,
    CellFinished,
    CellOutput,
    CellStarted,
    Event,
    Listener,
    ModelReplied,
    RunFinished,
    RunStarted,
    StepStarted,
    StopReason,
    SubcallFinished,
    SubcallStarted,
)
from .llm import AdapterError, Completion, LLMAdapter, Message, TokenUsage
from .loop import RLM, ReplFactory
from .policy import Policy, PolicyExceeded
from .trace import Trace

__all__ = (
    "RLM",
    "AdapterError",
    "AnswerRejected",
    "BatchFinished",
    "BatchStarted",
    "CellFinished",
    "CellOutput",
    "CellStarted",
    "Completion",
    "Event",
    "LLMAdapter",
    "Listener",
    "Message",
    "ModelReplied",
    "Policy",
    "PolicyExceeded",
    "ReplFactory",
    "RunFinished",
    "RunStarted",
    "StepStarted",
    "StopReason",
    "SubcallFinished",
    "SubcallStarted",
    "TokenUsage",
    "Trace",
)
