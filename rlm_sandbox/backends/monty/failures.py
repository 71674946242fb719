"""What the engine's exceptions mean: a guest's error with its traceback, a limit, or a death."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pydantic_monty as monty

from .remedy import with_remedy

__all__ = ("Ending", "Failure", "read_failure", "traceback_text")

MAX_ERROR_CHARS: Final = 10_000
_SHOWN_FRAMES: Final = 12
_FILE: Final = re.compile(r"<python-input-(\d{1,12})>")
_NUMBERS: Final = re.compile(r"memory limit exceeded: (\d{1,20}) bytes > \d{1,20} bytes")
_WORKER_MEMORY: Final = "the worker exceeded its memory limit and was terminated"


@dataclass(frozen=True, slots=True)
class Failure:
    """A guest's error. ``text`` is ``"Type: message"``; both are the guest's words, bounded."""

    text: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a feed ended that did not complete: ``kind`` is ``error``, ``memory``, ``time`` or ``died``."""

    kind: str
    failure: Failure
    observed_bytes: int | None = None
    exit_status: int | None = None


def read_failure(exc: BaseException, alive: bool, sources: Mapping[int, tuple[str, str]]) -> Ending:
    """Classify what an engine call raised.

    Args:
        exc: the exception.
        alive: the worker process still lives.
        sources: feed number to the name of its file in a traceback and its source.
    """
    if isinstance(exc, monty.MontyRuntimeError | monty.MontySyntaxError):
        text = exc.display("type-msg")
        name, _, message = text.partition(": ")
        failure = Failure(_bounded(with_remedy(name, text)), "")
        if name == "MemoryError" and not alive and message == _WORKER_MEMORY:
            return Ending("memory", failure)
        if not alive:
            return Ending("died", failure)
        numbers = _NUMBERS.fullmatch(message) if name == "MemoryError" and len(message) < 200 else None
        if numbers is not None:
            return Ending("memory", failure, observed_bytes=int(numbers[1]))
        failure = Failure(failure.text, traceback_text(exc.traceback(), failure.text, sources))
        return Ending("time" if name == "TimeoutError" and "time limit exceeded" in message[:100] else "error", failure)
    if isinstance(exc, monty.MontyCrashedError):
        return Ending("died", Failure("the interpreter's process died", ""), exit_status=exc.exit_status)
    if isinstance(exc, monty.MontyError):
        return Ending("error" if alive else "died", Failure(_bounded(f"{type(exc).__name__}: {exc}"), ""))
    return Ending("died", Failure(_bounded(f"{type(exc).__name__}: {exc}"), ""))


def _bounded(text: str) -> str:
    if len(text) <= MAX_ERROR_CHARS:
        return text
    half = MAX_ERROR_CHARS // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"


def traceback_text(frames: list[Any], error: str, sources: Mapping[int, tuple[str, str]]) -> str:
    """A traceback in Python's form, of the guest's own frames, with the lines as the guest wrote them."""
    shown: list[str] = []
    for frame in frames:
        match = _FILE.fullmatch(frame.filename)
        known = sources.get(int(match[1])) if match else None
        if match is not None and known is None:
            continue  # the machinery's own
        file, source = known or ("<string>", "")
        where = frame.function_name or "<module>"
        lines = source.splitlines()
        text = f'  File "{file}", line {frame.line}, in {where[:200]}'
        if 0 < frame.line <= len(lines):
            text += f"\n    {lines[frame.line - 1].strip()[:1000]}"
        shown.append(text)
    if len(shown) > 2 * _SHOWN_FRAMES:
        shown[_SHOWN_FRAMES:-_SHOWN_FRAMES] = [f"  ... {len(shown) - 2 * _SHOWN_FRAMES} frames left out ..."]
    return "\n".join(["Traceback (most recent call last):", *shown, error]) + "\n"
