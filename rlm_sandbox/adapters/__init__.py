"""Language models behind the orchestrator's `LLMAdapter`: maintained SDKs and one scripted fake."""

from __future__ import annotations

from .fake import FakeAdapter, FakeCall
from .openai_chat import OpenAIAdapter

__all__ = ("FakeAdapter", "FakeCall", "OpenAIAdapter")
