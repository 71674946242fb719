"""`WasmSession`: a session whose guest is an instance in this process, rebuilt from its journal when it was killed."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any, Final

from ...binding import Exposed
from ...bridge.capture import Capture
from ...bridge.context_calls import CONTEXT_ERRORS, BoundContext
from ...bridge.exchange import TurnEnd
from ...bridge.guest import Death, GuestLost
from ...bridge.handles import HandleTable
from ...bridge.session import Session
from ...bridge.verdict import worse
from ...context import Context, WholeText
from ...errors import BackendUnavailable, GuestCrashed, GuestError, LimitExceeded, ProtocolViolation, SessionClosed
from ...limits import Limits
from ...protocol import Capabilities
from ...registry import SessionConfig
from ...results import ExecResult, LimitHit, State
from ...wire.codec import Attachment, Encoder
from ...wire.messages import BindText, Configure, Exec, Message, dump_message
from ...wire.strings import dump_string
from .journal import Entry
from .peer import LivePeer
from .pool import InstancePool
from .replay import Replay
from .turn import WasmTurn

__all__ = ("WasmSession",)

log: Final = logging.getLogger("rlm_sandbox.session")

_NAME: Final = re.compile(r"\w+")
#: What a guest whose memory ran out must still be able to do, or it is given up.
_PROBE: Final = "bytes(4 << 20) and None"
#: How slow a machine may be in sending a text to a guest.
_CHARS_PER_SECOND: Final = 10_000_000


class WasmSession(Session):
    """See `Session`."""

    def __init__(self, instances: InstancePool, config: SessionConfig, capabilities: Capabilities) -> None:
        """
        Raises:
            BackendUnavailable: no instance could be made.
            GuestError, LimitExceeded, GuestCrashed: ``config.setup`` failed.
        """
        self._instances = instances
        self._configuration = _configuration(config)
        self._take_instance(config.limits.memory_mb)
        self._replay = Replay(instances, config.limits.memory_mb)
        self._mark = 0
        self._contexts: dict[int, BoundContext] = {}
        #: Whole texts that are bound and not yet in the guest.
        self._absent_texts: dict[str, Context] = {}
        self._peer: LivePeer | None = None
        super().__init__(config, capabilities)
        self._begin()
        try:
            self._configure()
        except BaseException:
            self.close()
            raise

    def _take_instance(self, memory_mb: int | None) -> None:
        self._instance, self._configured = self._instances.take(self._configuration)
        self._instance.limit_memory(memory_mb)

    def _configure(self) -> None:
        entry, self._configured = self._configured, None
        if entry is None:
            super()._configure()
        elif self._config.recovery:
            self._replay.journal.add(entry)

    # ---- turns

    def _run_turn(
        self, limits: Limits, capture: Capture, message: Message, attachments: list[Attachment], beside: Any, charged: float
    ) -> TurnEnd:
        self._mark = self._handles.mark()
        self._peer = peer = LivePeer(Entry("", beside if isinstance(beside, Context) else None, self._replay.journal.room))
        turn = WasmTurn(self._instance, peer, self._handles, self._pool, limits, capture, self._is_interrupted, self._until)
        end = turn.run(message, attachments)
        self._peer = None
        if end.kind == "done" and self._config.recovery:
            entry = peer.entry
            entry.ended, entry.seconds = hash(peer.ended), max(0.0, end.turn_seconds - entry.slept)
            self._replay.journal.add(entry)
        return end

    def _abandon_turn(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.stop()

    def _prepare(self, *, protect: bool = False) -> None:
        if self._out_of_step:
            state, lost, _ = self._recover(TurnEnd("died", death=Death(why="its last turn was abandoned")))
            self._pending_state, self._pending_lost = worse(self._pending_state, state), (*self._pending_lost, *lost)
        self._check_open()
        self._replay.cell_begins()
        self._protected = self._config.recovery and self._replay.protected

    def _turn_ended(self) -> None:
        self._cell_ended(None)

    def _cell_ended(self, cpu_seconds: float | None) -> None:
        if self._config.recovery:
            self._replay.follow()

    def _changed(self) -> None:
        """Its entry is in the journal."""

    def _check_memory(self, end: TurnEnd) -> float | None:
        """A heap that a cell left full of what it still holds would fail every later one, one that frees it included."""
        if end.failure is not None and end.failure[0] == "MemoryError" and self._protected:
            position = len(self._replay.journal) - 1
            after = self._turn(self._limits, Capture(0), Exec(0, _PROBE, [], 0), [])
            if after.kind != "done" or after.failure is not None:
                self._replay.drop_since(position)
                end.kind = "killed"
        return None

    def _wake_up(self) -> None:
        peer = self._peer
        if peer is not None:
            peer.signals.put(None)

    # ---- texts and contexts

    def _exec(self, code: str, read: list[str], limits: Limits, on_output: Any) -> ExecResult:
        if self._absent_texts:
            try:
                self._bring_texts({*_NAME.findall(code), *read})
            except (GuestError, LimitExceeded, GuestCrashed, ProtocolViolation) as exc:
                return _no_text(exc, limits)
        return super()._exec(code, read, limits, on_output)

    def get(self, name: str, default: Any = None) -> Any:
        """See `REPLProtocol.get`."""
        if name in self._absent_texts:
            with self._call():
                self._bring_texts({name})
        return super().get(name, default)

    def _bring_texts(self, names: set[str]) -> None:
        for name in names & set(self._absent_texts):
            context = self._absent_texts[name]
            encoder = Encoder()
            nothing = encoder.encode(None)
            message = BindText(name, True, len(context), 1, False, nothing, nothing)
            seconds = self._limits.time_seconds
            if seconds is not None:  # the guest's clock runs while it is sent
                seconds += len(context) / _CHARS_PER_SECOND
            self._plain_turn(message, encoder.attachments, context, limits=replace(self._limits, time_seconds=seconds))
            del self._absent_texts[name]

    def _bind_text(self, name: str, target: Any) -> bool:
        if not isinstance(target, WholeText):
            self._absent_texts.pop(name, None)
            return False
        self._absent_texts[name] = target.context
        if name in _NAME.findall(self._config.setup):
            self._bring_texts({name})  # a function of the setup may use it without the cell naming it
        return True

    def _new_handles(self) -> HandleTable:
        return HandleTable(self._expose)

    def _expose(self, context: Context) -> tuple[Exposed, tuple[type[BaseException], ...]]:
        bound = self._contexts.get(id(context))
        if bound is None:
            bound = self._contexts[id(context)] = BoundContext(context, self._limits.value_bytes)
        return bound.exposed(), CONTEXT_ERRORS

    # ---- recovery

    def _recover(self, end: TurnEnd) -> tuple[State, tuple[str, ...], Death]:
        for context in self._contexts.values():
            context.search.cancel()
        self._handles.drop_since(self._mark)
        self._instance.discard()  # before another takes as much memory
        lost = tuple(self._known_names)
        try:
            instance = self._replay.recover() if self._config.recovery else None
            if instance is not None:
                self._instance, self._out_of_step = instance, False
                self._replay.follow()  # only now: the dead instance's memory is free
                return "restored", (), end.death
            self._begin_anew()
        except (GuestLost, BackendUnavailable):  # later calls say so; this one has its result
            log.warning("the session could not be rebuilt", exc_info=True)
            self._closed = True
            self._close_reason = "the session could not be rebuilt after a failure"
        return "lost", lost, end.death

    def _start_afresh(self) -> None:
        try:
            self._begin_anew()
        except (GuestLost, BackendUnavailable) as exc:
            self._closed = True
            self._close_reason = "the session could not be rebuilt"
            raise SessionClosed(f"{self._close_reason}; open a new one") from exc

    def _begin_anew(self) -> None:
        self._instance.discard()
        self._take_instance(self._limits.memory_mb)
        self._out_of_step = False
        self._replay.forget()
        self._absent_texts.clear()
        self._close_contexts()
        self._set_up_again()

    def _close_contexts(self) -> None:
        contexts, self._contexts = self._contexts, {}
        for context in contexts.values():
            context.search.close()

    def _free_guest(self) -> None:
        self._close_contexts()
        self._replay.close()
        self._instance.discard()


def _configuration(config: SessionConfig) -> str:
    """The frame a session without a setup is configured with; no instance is configured ahead for one with a setup."""
    message = Configure(config.limits.output_bytes, config.limits.value_bytes, "")
    return "" if config.setup else dump_string(dump_message(message), [], max_chars=1 << 20)


def _no_text(exc: GuestError | LimitExceeded | GuestCrashed | ProtocolViolation, limits: Limits) -> ExecResult:
    """The result of a cell that did not run, because the whole text it names cannot be had in its guest."""
    text = f"the whole text of a context could not be brought into the guest: {exc}; read it in parts, by its methods"
    state: State = "kept" if isinstance(exc, GuestError) else "restored"
    if isinstance(exc, GuestError) and exc.type_name == "MemoryError":
        return ExecResult(
            outcome="limit",
            error=f"MemoryError: {text}",
            limit=LimitHit("memory_mb", limits.memory_mb or 0, None, "guest"),
            state=state,
        )
    if isinstance(exc, LimitExceeded):
        hit = LimitHit(exc.kind, exc.limit, exc.observed, "host")
        return ExecResult(outcome="limit", error=f"LimitExceeded: {text}", limit=hit, state=state)
    return ExecResult(outcome="error", error=f"RuntimeError: {text}", state=state)
