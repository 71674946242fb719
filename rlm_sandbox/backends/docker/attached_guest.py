"""`AttachedGuest`: one session's container, seen from the host: the descriptors of an ordinary guest, carried by its attached stream."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Mapping
from typing import Final

from ...bridge.guest import GuestLost, Recovery, Report
from ...bridge.readiness import becomes_ready
from ...bridge.supervised import death_of, report_of
from ...context import Context, DataContext
from ...limits import Limits
from ...options import DockerOptions
from ...results import Stream
from ...runners.framing import INTERRUPT, MEASURE, STDERR, STDOUT
from ...wire import control
from .carrier import Carrier
from .contexts import SessionDirectory
from .engine import Engine
from .session_container import RECOVER_SECONDS, START_SECONDS, SessionContainer, settings_for
from .volumes import volume_for

__all__ = ("AttachedGuest",)

_KEY_BYTES: Final = 32
_ANSWER_SECONDS: Final = 10.0
#: During host calls the worker's clock is asked for at most this often; the answer counts at the next look.
_CLOCK_SECONDS: Final = 0.02


class AttachedGuest:
    """A guest in a container. Not thread-safe: its session is."""

    maps_contexts = True

    def __init__(self, engine: Engine, options: DockerOptions, limits: Limits, *, recovery: bool) -> None:
        self._closed = False
        self._generation = 1
        self._turn = 0
        self._clock_asked = 0.0
        self._contexts = SessionDirectory() if engine.local else volume_for(engine, options.image)
        self._container: SessionContainer | None = None
        self._carrier: Carrier | None = None
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        self.outputs: Mapping[int, Stream] = {out_read: "stdout", err_read: "stderr"}
        try:
            for fd in self.outputs:
                os.set_blocking(fd, False)
            contexts = self._contexts.mount()
            container = SessionContainer(engine, options, limits, recovery=recovery, contexts=contexts, sockets=False)
            self._container = container
            self._carrier = Carrier(container.attached, {STDOUT: out_write, STDERR: err_write}, self._contexts)
            container.start()
            try:
                self._say_hello(options, limits, recovery=recovery)
            except GuestLost as exc:
                raise container.did_not_start(exc) from None
        except BaseException:
            self.close()
            raise
        finally:
            if self._carrier is None:
                os.close(out_write)
                os.close(err_write)

    def _say_hello(self, options: DockerOptions, limits: Limits, *, recovery: bool) -> None:
        settings: control.Message = {
            **settings_for(limits),
            # A named runtime may be gVisor, where a worker can open the relay's streams.
            "key": "" if options.runtime is None else secrets.token_hex(_KEY_BYTES),
            "plain": options.runtime is not None,
            "recovery": recovery,
        }
        try:
            self._carried.settings(settings)
        except OSError as exc:
            raise GuestLost(f"the container is gone ({exc.strerror or exc})") from None
        message = self._receive(START_SECONDS)
        if message["op"] != "ready":
            raise GuestLost(f"a step of its confinement failed: {str(message.get('error', 'unknown'))[:300]}")

    @property
    def _carried(self) -> Carrier:
        assert self._carrier is not None
        return self._carrier

    @property
    def data(self) -> Carrier:
        """See `Guest.data`: the same for each worker."""
        return self._carried

    @property
    def stream(self) -> Carrier:
        """See `Guest.stream`."""
        return self._carried

    # ---- control

    @property
    def control_fd(self) -> int:
        """The socket of the supervisor's reports."""
        return self._carried.reports.fileno()

    def _receive(self, seconds: float) -> control.Message:
        reports = self._carried.reports
        if not becomes_ready(self, reports.fileno(), seconds):
            raise GuestLost("the supervisor did not answer in time")
        try:
            got = control.receive(reports)
        except (OSError, ValueError) as exc:
            raise GuestLost(f"the supervisor's channel failed: {exc}") from None
        if got is None:
            assert self._container is not None
            raise self._container.gone()
        return got[0]

    def _order(self, message: control.Message) -> None:
        try:
            self._carried.order_supervisor(message)
        except OSError as exc:
            raise GuestLost(f"the container is gone ({exc.strerror or exc})") from None

    def restart_clock(self, seconds: float | None) -> None:
        """See `Guest.restart_clock`."""
        assert self._container is not None
        self._order(self._container.clock_order(seconds))

    def report(self) -> Report | None:
        """See `Guest.report`."""
        if not becomes_ready(self, self.control_fd, 0):
            return None
        message = self._receive(1.0)
        if message["op"] in ("protected", "unprotected"):
            self._carried.corked = True  # the supervisor has stopped the worker
        return report_of(message, death_of)

    def _ask(self, order: control.Message, answer: str) -> control.Message:
        """An order that is answered at once, outside any turn of the worker."""
        self._order(order)
        while True:
            message = self._receive(_ANSWER_SECONDS)
            if message["op"] == answer:
                return message
            if message["op"] == "died":
                raise GuestLost("the worker died")

    def request_protection(self) -> None:
        """See `Guest.request_protection`."""
        self._carried.prepare_ticket()

    def recover(self, *, fresh: bool) -> Recovery:
        """See `Guest.recover`."""
        self._generation += 1
        carrier = self._carried
        self._order({"op": "fresh" if fresh else "recover", "generation": self._generation})
        carrier.begin_generation(self._generation)
        until = time.monotonic() + RECOVER_SECONDS
        while (left := until - time.monotonic()) > 0:
            message = self._receive(left)
            if message["op"] == "recovered" and message.get("generation") == self._generation:
                break  # else a report that crossed the order, or the answer to one whose caller was interrupted
        else:
            raise GuestLost("the supervisor did not answer in time")
        carrier.corked = False
        return Recovery("restored" if message["state"] == "restored" else "fresh", death_of(message))

    # ---- signals and measurements

    def wake(self) -> None:
        """See `Guest.wake`."""
        self._turn = (self._turn + 1) & 0xFFFF
        with contextlib.suppress(OSError):  # the turn sees the end of the channel
            self._carried.wake(self._turn)

    def _signal(self, order: int) -> None:
        with contextlib.suppress(OSError):
            self._carried.order(order)

    def stop(self) -> None:
        """See `Guest.stop`."""
        with contextlib.suppress(OSError):
            self._carried.stop()

    def interrupt(self) -> None:
        """See `Guest.interrupt`."""
        self._signal(INTERRUPT)

    def cpu_seconds(self) -> float | None:
        """See `Guest.cpu_seconds`. As of the worker's last bytes, or of an answer to an earlier call."""
        carrier, now = self._carried, time.monotonic()
        if not carrier.corked and now - max(self._clock_asked, carrier.measured_at) > _CLOCK_SECONDS:
            self._clock_asked = now
            self._signal(MEASURE)
        return carrier.cpu_seconds

    def peak_memory_mb(self) -> float | None:
        """See `Guest.peak_memory_mb`."""
        try:
            value = self._ask({"op": "measure"}, "measured").get("peak_kb")
        except GuestLost:
            return None
        return value / 1024 if type(value) is int else None

    def memory_headroom_mb(self) -> float | None:
        """See `Guest.memory_headroom_mb`. As of the worker's last bytes."""
        return self._carried.headroom_mb

    def grow_address_space(self, size: int) -> None:
        """See `Guest.grow_address_space`. The supervisor moves the soft limit: a worker may not set limits."""
        self._ask({"op": "grow", "bytes": size}, "grown")

    def open_context(self, context: Context | DataContext) -> int:
        """See `Guest.open_context`."""
        return self._contexts.open(context)

    # ---- the end

    def close(self) -> None:
        """See `Guest.close`. In a forked child of the host the container is still the parent's."""
        if self._closed:
            return
        self._closed = True
        if self._carrier is not None:
            self._carrier.close()  # the end of its standard input is the end of a container, too
        elif self._container is not None:
            self._container.attached.close()
        if self._container is not None:
            self._container.remove()
        for fd in self.outputs:
            os.close(fd)
        if isinstance(self._contexts, SessionDirectory):
            self._contexts.close()
