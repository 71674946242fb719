"""The `monty` backend: a Rust interpreter of a Python subset, in worker processes."""

from __future__ import annotations

from typing import Final

import pydantic_monty as monty

from ...errors import BackendUnavailable
from ...options import MontyOptions
from ...protocol import Capabilities, Feature, Grade, REPLProtocol
from ...registry import Availability, SessionConfig
from .pool import KERNEL_LIMITS, open_slot
from .session import MontySession

__all__ = ("MontyBackend",)

_LANGUAGE: Final = frozenset(
    {
        Feature.CLASSES, Feature.CLOSURES, Feature.MATCH, Feature.ASYNC, Feature.TOP_LEVEL_AWAIT, Feature.LATE_GLOBALS,
        Feature.ECHO, Feature.SOURCE_TRACEBACKS, Feature.SYSTEM_EXIT,
    }
)  # fmt: skip
_NOTES: Final = (
    "This is a subset of Python: no class inheritance, no `yield`, no `del`, no decorators on methods.",
    (
        "Importable: asyncio base64 binascii bisect collections copy csv dataclasses datetime decimal functools hashlib "
        "itertools json math os pathlib random re sys time tomllib typing unicodedata."
    ),
    "A generator expression is a list: bound it before you write it. `re.sub` takes no function.",
    "Call host functions in loops and comprehensions, not inside map(), filter(), sorted(key=...) or max(key=...).",
    "len(ctx), ctx[a:b], `x in ctx` and loops work on the name ctx itself; elsewhere use ctx.len_chars() and ctx.slice(a, b).",
)


class MontyBackend:
    """See `registry.Backend`."""

    def __init__(self) -> None:
        self._proven = False

    def probe(self) -> Availability:
        """Run one expression in a worker; once it has worked it is not tried again."""
        if self._proven:
            return Availability(True)
        try:
            with monty.Monty(min_processes=1, max_processes=1, request_timeout=10.0) as pool, pool.checkout() as session:
                works = session.feed_run("1 + 1") == 2
        except Exception as exc:  # noqa: BLE001 - whatever keeps the engine from running is the reason
            return Availability(False, f"the engine does not run ({type(exc).__name__})", "run: pip install 'rlm-sandbox[monty]'")
        if not works:
            return Availability(False, "the engine gives wrong answers", "run: pip install --force-reinstall 'rlm-sandbox[monty]'")
        self._proven = True
        return Availability(True)

    def capabilities(self, config: SessionConfig) -> Capabilities:
        """What a session enforces. Processes, disk and network do not exist in the language."""
        return Capabilities(
            backend="monty",
            isolation="a Rust interpreter of a Python subset in a worker process of the host's user, under kernel limits of "
            "memory and time; no namespaces, no seccomp",
            time_seconds=Grade.HARD,
            wall_seconds=Grade.HARD,
            output_bytes=Grade.HARD,
            host_calls=Grade.HARD,
            value_bytes=Grade.HARD,
            memory_mb=Grade.HARD if KERNEL_LIMITS else Grade.COOPERATIVE,
            processes=Grade.HARD,
            disk_mb=Grade.HARD,
            session_seconds=Grade.HARD,
            network=Grade.HARD,
            crash=Grade.HARD,
            interrupt=Grade.HARD,
            language=_LANGUAGE,
            soft_interrupt=False,
            recovery="dump" if config.recovery else "none",
            context_route="host_calls",
            notes=_NOTES,
        )

    def open(self, config: SessionConfig) -> REPLProtocol:
        """Open a session.

        Raises:
            PoolTimeout: every worker is in use.
            BackendUnavailable: the engine cannot be started.
            GuestError: ``setup`` raised.
        """
        options = config.options if isinstance(config.options, MontyOptions) else MontyOptions()
        try:
            slot = open_slot(options.max_processes)
        except (monty.MontyError, OSError) as exc:
            raise BackendUnavailable(
                "monty",
                f"its worker cannot be started ({type(exc).__name__})",
                "run: pip install --force-reinstall 'rlm-sandbox[monty]'",
            ) from exc
        try:
            return MontySession(config, slot, self.capabilities(config))
        except BaseException:
            slot.release()
            raise
