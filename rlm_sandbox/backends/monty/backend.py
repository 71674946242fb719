"""The `monty` backend: a Rust interpreter of a Python subset, in worker processes."""

from __future__ import annotations

from typing import Final

import pydantic_monty as monty

from ...errors import BackendUnavailable
from ...limits import Limits
from ...options import BackendOptions, MontyOptions
from ...protocol import Capabilities, Feature, Grade, REPLProtocol
from ...registry import Availability, SessionConfig
from .launch import confined_launcher
from .pool import shared_pool
from .session import MontySession
from .turn import MAX_PENDING_BYTES
from .values import MAX_FRAME_BYTES
from .worker import KERNEL_LIMITS, MAX_DUMP_BYTES, SLACK_BYTES, dump_room

__all__ = ("MontyBackend",)

_LANGUAGE: Final = frozenset(
    {
        Feature.CLASSES, Feature.CLOSURES, Feature.MATCH, Feature.ASYNC, Feature.TOP_LEVEL_AWAIT, Feature.LATE_GLOBALS,
        Feature.ECHO, Feature.SOURCE_TRACEBACKS, Feature.SYSTEM_EXIT,
    }
)  # fmt: skip
_ISOLATION: Final = {
    "kernel": (
        "a Rust interpreter of a Python subset in a worker process of its own, without privileges, in user, mount, network, ipc "
        "and uts namespaces, on a tree that holds nothing but the interpreter, behind a seccomp allow-list; the host's kernel is "
        "shared"
    ),
    "language": (
        "a Rust interpreter of a Python subset in a worker process of the host's user, under kernel limits of memory and time; "
        "no namespaces, no seccomp"
    ),
}
#: What an idle worker takes.
_WORKER_MB: Final = 20
_NOTES: Final = (
    "This is a subset of Python: no class inheritance, no `yield`, no decorators on methods, no `del` (write d.pop(k)).",
    "Methods are no values: write key=lambda w: w.lower(), not key=str.lower or key=items.count.",
    (
        "Importable: asyncio base64 binascii bisect collections copy csv dataclasses datetime decimal functools hashlib "
        "itertools json math os pathlib random re sys time tomllib typing unicodedata."
    ),
    "Classes may define __init__, __repr__, __eq__, __add__, __getitem__, __iter__, __call__ and the like, not __len__, __lt__, __bool__.",
    "Generator expressions, zip(), map() and filter() give lists: bound them first, no next(). No function in re.sub and json.dumps.",
    "Call host functions in loops and comprehensions, not inside map(), filter(), sorted(key=...) or max(key=...).",
    "len(ctx), ctx[a:b], `x in ctx` and loops work on the name ctx itself; elsewhere use ctx.len_chars() and ctx.slice(a, b).",
)


class MontyBackend:
    """See `registry.Backend`."""

    def __init__(self) -> None:
        self._proven: set[str] = set()

    def probe(self, options: BackendOptions | None = None) -> Availability:
        """Run one expression in a worker of the kind the options ask for; once that has worked it is not tried again."""
        confinement = _options(options).confinement
        if confinement in self._proven:
            return Availability(True)
        binary = None
        if confinement == "kernel":
            launcher = confined_launcher()
            if launcher.path is None:
                return Availability(False, launcher.reason, launcher.remedy)
            binary = launcher.path
        try:
            engine = monty.Monty(binary_path=binary, min_processes=0, max_processes=1, request_timeout=10.0)
            with engine as pool, pool.checkout() as session:
                works = session.feed_run("1 + 1") == 2
        except Exception as exc:  # noqa: BLE001 - whatever keeps the engine from running is the reason
            return Availability(False, f"the engine does not run ({type(exc).__name__})", "run: pip install 'rlm-sandbox[monty]'")
        if not works:
            return Availability(False, "the engine gives wrong answers", "run: pip install --force-reinstall 'rlm-sandbox[monty]'")
        self._proven.add(confinement)
        return Availability(True)

    def capabilities(self, config: SessionConfig) -> Capabilities:
        """What a session enforces. Processes, disk and network do not exist in the language."""
        return Capabilities(
            backend="monty",
            isolation=_ISOLATION[_options(config.options).confinement],
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
            fork=True,
            host_memory_worst_mb=_worst_mb(config.limits, recovery=config.recovery),
            notes=_NOTES,
        )

    def open(self, config: SessionConfig) -> REPLProtocol:
        """Open a session.

        Raises:
            PoolTimeout: every worker is in use.
            BackendUnavailable: the engine cannot be started.
            GuestError: ``setup`` raised.
        """
        options = _options(config.options)
        binary = None
        if options.confinement == "kernel":
            launcher = confined_launcher()
            if launcher.path is None:
                raise BackendUnavailable("monty", launcher.reason, launcher.remedy)
            binary = launcher.path
        try:
            slot = shared_pool(options.max_processes, options.spare_workers, binary).slot()
        except (monty.MontyError, OSError) as exc:
            raise _broken(exc) from exc
        try:
            return MontySession(config, slot, self.capabilities(config))
        except (monty.MontyError, OSError) as exc:
            slot.release()
            raise _broken(exc) from exc
        except BaseException:
            slot.release()
            raise


def _worst_mb(limits: Limits, *, recovery: bool) -> int | None:
    """The most one session takes, worker and host together, but for a search process and checkpoints. None if not bounded.

    The worker while its state is written; on the host the engine's copy of a crossing value (measured: 1.5 times what the
    worker may hold), ours (the codec's and the answer's), arguments of pending calls, and the recovery point as it comes in.
    """
    if limits.memory_mb is None or not KERNEL_LIMITS:
        return None
    memory = limits.memory_mb
    held = memory + (SLACK_BYTES >> 20)
    dumps = (dump_room(memory << 20) >> 20) + 2 * min(memory, MAX_DUMP_BYTES >> 20) if recovery else 0
    value = MAX_FRAME_BYTES if limits.value_bytes is None else min(limits.value_bytes, MAX_FRAME_BYTES)
    return held + _WORKER_MB + dumps + held * 3 // 2 + ((4 * value + MAX_PENDING_BYTES) >> 20)


def _options(options: BackendOptions | None) -> MontyOptions:
    return options if isinstance(options, MontyOptions) else MontyOptions()


def _broken(exc: Exception) -> BackendUnavailable:
    return BackendUnavailable(
        "monty",
        f"its worker cannot be started ({type(exc).__name__})",
        "run: pip install --force-reinstall 'rlm-sandbox[monty]'",
    )
