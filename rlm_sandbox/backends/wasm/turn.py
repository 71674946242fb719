"""One turn on an in-process guest: the guest runs on a cell thread, this one waits for what it does and for deadlines."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Final

from ...bridge.capture import Capture
from ...bridge.exchange import Exchange, TurnEnd
from ...bridge.guest import Death
from ...bridge.handles import HandleTable
from ...bridge.host_pool import HostPool
from ...limits import Limits
from ...results import Stream
from ...waiting import piece
from ...wire.codec import Attachment, WireError
from ...wire.messages import FRAME_OVERHEAD, Done, Message, dump_message
from ...wire.strings import dump_string, load_string
from .instance import Instance
from .peer import LivePeer

__all__ = ("MAX_FRAME_CHARS", "WasmTurn")

#: What goes to a guest in one frame: well below what an instance of 4 GiB could take.
MAX_FRAME_CHARS: Final = 1 << 30
_STREAMS: Final[dict[int, Stream]] = {1: "stdout", 2: "stderr"}


class WasmTurn(Exchange):
    """Runs one request. Made for one turn and thrown away."""

    def __init__(
        self,
        instance: Instance,
        peer: LivePeer,
        handles: HandleTable,
        pool: HostPool,
        limits: Limits,
        capture: Capture,
        is_interrupted: Callable[[], bool],
        session_until: float | None,
    ) -> None:
        super().__init__(handles, pool, limits, capture, is_interrupted, session_until)
        self._instance = instance
        self._peer = peer
        self._started = False
        # Base64 makes bytes a third longer.
        self._max_chars = MAX_FRAME_CHARS if limits.value_bytes is None else 4 * limits.value_bytes // 3 + FRAME_OVERHEAD
        # A guest that computes cannot be interrupted, only killed; one that waits for the host is told to go on without.
        self._watchdog.soft = False

    def run(self, message: Message, attachments: list[Attachment]) -> TurnEnd:
        """Send a request and see its turn through. Never raises for anything the guest does.

        Raises:
            FrameTooLarge: the request itself is too large; nothing was sent.
            BackendUnavailable: no thread could be started for it.
        """
        try:
            self._hand_over(message, attachments)
            end = self.seen_through()
            if end.kind != "done":
                self._peer.stop()
            self._take_output()
            return self.measured(end)
        finally:
            self.close()

    def _step(self) -> TurnEnd | None:
        now = time.monotonic()
        end = self.check_deadlines(now)
        if end is not None:
            return end
        wait = self.wait_seconds(now)
        try:
            self._peer.signals.get(timeout=piece(wait))
        except queue.Empty:
            return None
        self._take_output()
        if self._peer.ended is not None:
            return self._take(self._peer.ended, returned=True)
        if self._peer.suspended is not None:
            frame, self._peer.suspended = self._peer.suspended, None
            return self._take(frame, returned=False)
        if self._peer.failed is not None:
            return TurnEnd("died", death=Death(why=self._peer.failed))
        return None

    def _take(self, frame: str, *, returned: bool) -> TurnEnd | None:
        header, attachments = load_string(frame, max_chars=self._max_chars)
        # An end that is only said, by a guest that goes on, would have the next request run in the same instance beside it.
        if returned is not (type(header) is list and header[:1] == [Done.op]):
            raise WireError("it returned and did not say so" if returned else "it said what only a guest that returns may say")
        self._watchdog.soft = True
        return self.on_message(header, attachments, len(frame))

    def _take_output(self) -> None:
        for descriptor, data in self._peer.take_output():
            self._capture.add(_STREAMS.get(descriptor, "stderr"), data)

    def _deliver(self, message: Message, attachments: list[Attachment]) -> None:
        frame = dump_string(dump_message(message), attachments, max_chars=MAX_FRAME_CHARS)
        # While the guest has the turn there is nobody in it who could be asked to stop.
        self._watchdog.soft = False
        if self._started:
            self._peer.answer(frame)
        else:
            self._started = True
            self._peer.entry.request = frame
            self._instance.start(frame, self._peer)

    def _delivered(self) -> bool:
        return True

    def _interrupt_guest(self) -> None:
        """Nothing can be asked of it while it has the turn."""

    def _cpu_seconds(self) -> float | None:
        return None

    def _wake_up(self) -> None:
        self._peer.signals.put(None)
