"""`CopyingSession`: a framed session that can be forked, and go back to what it was, by the mechanism of its recovery."""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..errors import GuestCrashed
from ..protocol import Capabilities
from ..registry import SessionConfig
from .framed import STANDBY_HELLO_SECONDS, FramedSession
from .guest import CopyingGuest, GuestLost
from .handles import Binding, HandleTable
from .pressure import own_pressure
from .turn import Turn

__all__ = ("MAX_CHECKPOINTS", "CopyingSession")

#: States a session can go back to; beyond it the oldest goes. Each is a process with the memory of its moment.
MAX_CHECKPOINTS: Final = 8


@dataclass(frozen=True, slots=True)
class _Moment:
    """What the host knows of a state that is kept."""

    key: int
    handles: HandleTable
    bindings: dict[str, Binding]
    names: tuple[str, ...]


class CopyingSession(FramedSession):
    """See `FramedSession`, `SupportsFork` and `SupportsCheckpoint`."""

    _guest: CopyingGuest

    def __init__(
        self,
        start: Callable[[], CopyingGuest],
        config: SessionConfig,
        capabilities: Capabilities,
        origin: tuple[CopyingSession, CopyingGuest] | None = None,
    ) -> None:
        """
        Args:
            start: starts a guest; called again if one is lost altogether.
            config: what the session was opened with.
            capabilities: what it declares.
            origin: for a copy, the session it is of and the guest that has its state.
        """
        self._origin = origin
        self._starts = start
        self._keys = itertools.count(1)
        self._checkpoints: dict[str, _Moment] = {}
        super().__init__(start if origin is None else lambda: origin[1], config, capabilities)
        self._start, self._origin = start, None

    def _set_up_first(self) -> None:
        if self._origin is None:
            super()._set_up_first()
            return
        origin, _ = self._origin
        self._greet(STANDBY_HELLO_SECONDS)
        self._guest.stop()
        self._cell = origin._cell
        self._adopt(origin._moment(0))

    def _moment(self, key: int) -> _Moment:
        return _Moment(key, self._handles.copy({}), dict(self._bindings), tuple(self._known_names))

    def _adopt(self, moment: _Moment) -> None:
        self._handles = moment.handles.copy({})
        self._bindings = dict(moment.bindings)
        self._known_names = list(moment.names)

    # ---- the contract's optional parts

    def fork(self) -> CopyingSession:
        """See `SupportsFork.fork`. The copy has the same host objects; its ``session_seconds`` begin now. Threads that cells
        left behind end, in both.

        Raises:
            GuestCrashed: there is no memory, task or room for a copy; ``state`` says what became of this session.
        """
        with self._call():
            self._need_standby()
            self._standby_is_used()
            try:
                guest = self._guest.branch()
            except GuestLost as exc:
                raise self._not_copied(str(exc)) from None
            try:
                copy = type(self)(self._starts, self._config, self._capabilities, (self, guest))
            except GuestLost as exc:
                guest.close()
                raise self._not_copied(str(exc)) from None
            try:
                self._move()
            except BaseException:
                copy.close()
                raise
            return copy

    def checkpoint(self) -> str:
        """See `SupportsCheckpoint.checkpoint`. A process is kept for it, which holds its memory; beyond 8 the oldest goes.

        Raises:
            GuestCrashed: there is no memory or task for it; ``state`` says what became of the session.
        """
        with self._call():
            self._need_standby()
            while len(self._checkpoints) >= MAX_CHECKPOINTS:
                self._guest.forget(self._checkpoints.pop(next(iter(self._checkpoints))).key)
            moment = self._moment(next(self._keys))
            self._keep(moment.key)
            name = secrets.token_hex(8)
            self._checkpoints[name] = moment
            self._protect_again()
            return name

    def restore(self, checkpoint: str) -> None:
        """See `SupportsCheckpoint.restore`. Bindings go back, too; files do not. May be repeated.

        Raises:
            ValueError: there is no such checkpoint of this session.
            GuestCrashed: the kernel has ended the checkpoint's process; ``state`` says what became of the session.
        """
        with self._call():
            moment = self._checkpoints.get(checkpoint) if isinstance(checkpoint, str) else None
            if moment is None:
                raise ValueError("there is no such checkpoint of this session; take one with checkpoint()")
            self._check_descriptors()
            self._prepare()
            if self._checkpoints.get(checkpoint) is not moment:
                raise self._not_copied("the checkpoint was lost with its guest")
            try:
                if not self._go_over(moment.key):
                    del self._checkpoints[checkpoint]
                    raise self._not_copied("the kernel has ended the checkpoint's process")
                self._adopt(moment)
                self._take_pending()  # what became of the state that was given up
                # Its process is the worker now; a copy of it takes its place.
                self._make_standby()
                if self._has_standby:
                    self._keep(moment.key)
                else:
                    del self._checkpoints[checkpoint]
            except GuestLost as exc:
                self._lose()
                raise self._not_copied(str(exc), state="lost") from None
            self._protect_again()

    # ---- standbys

    def _begin_turn(self, turn: Turn) -> None:
        if self._has_standby:
            turn.relieve_with(self._relieve)

    def _relieve(self) -> None:
        """Under memory pressure the standby goes first; the supervisor reports that it is gone."""
        if own_pressure().is_high():
            self._guest.drop_standby()

    def _protect(self, *, wanted: bool | None = None) -> None:
        if wanted is None and self._config.recovery and own_pressure().was_high():
            # The one there is, if any, is of an older state.
            self._protected, self._has_standby, self._stale = False, False, True
            with contextlib.suppress(GuestLost):  # the next turn finds out
                self._guest.drop_standby()
            self._guest.stop()
            return
        super()._protect(wanted=wanted)

    def _need_standby(self) -> None:
        """The present state as a standby.

        Raises:
            GuestCrashed: the kernel does not give us one.
        """
        self._check_descriptors()
        self._prepare(protect=True)
        try:
            if not self._has_standby or self._stale:
                self._make_standby()
        except GuestLost as exc:
            self._lose()
            raise self._not_copied(str(exc), state="lost") from None
        if not self._has_standby:
            raise self._not_copied("the kernel gives no process for it: memory_mb or processes is used up")

    def _check_descriptors(self) -> None:
        try:
            self._guest.check_descriptors()
        except GuestLost as exc:
            raise self._not_copied(str(exc)) from None

    def _make_standby(self) -> None:
        self._guest.wake()
        self._protect(wanted=True)
        self._await_protection()

    def _standby_is_used(self) -> None:
        self._protected = self._has_standby = False
        self._stale = True

    def _protect_again(self) -> None:
        """The standby is on its way while the caller goes on."""
        self._guest.wake()
        self._protect()

    def _keep(self, key: int) -> None:
        self._standby_is_used()
        try:
            self._guest.keep(key)
        except GuestLost as exc:
            raise self._not_copied(str(exc)) from None

    def _move(self) -> None:
        """This session goes over to a process of its own, too: what the copy may hold of the old one's channels is of no use.

        Raises:
            GuestCrashed: it could not; nothing may share its channels, so the copy must go.
        """
        try:
            self._make_standby()
            if not self._has_standby:
                raise self._not_copied("the kernel gives no second process for it: memory_mb or processes is used up")
            self._go_over(None)
        except GuestLost as exc:
            self._lose()
            raise self._not_copied(str(exc), state="lost") from None
        self._protect_again()

    def _go_over(self, key: int | None) -> bool:
        """Have what was kept, or the standby, in the worker's place. False if it is gone and nothing has changed."""
        self._standby_is_used()
        with self._replacing():
            recovery = self._guest.take_over(key)
            if recovery is not None and recovery.state != "restored":
                raise GuestLost("the process that was to take over is gone")
            if recovery is not None:
                self._cpu_at_end = None
                self._greet(STANDBY_HELLO_SECONDS)
                self._guest.stop()
        return recovery is not None

    def _not_copied(self, why: str, *, state: str | None = None) -> GuestCrashed:
        state = state or self._pending_state
        return GuestCrashed(f"this could not be done: {why}; the session's state is {state}", state=state)

    def _rebuild(self) -> None:
        self._checkpoints.clear()  # their processes went with the guest
        super()._rebuild()
