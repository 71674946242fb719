"""A supervisor that lies, hangs or dies, and a standby that never greets: the session is whole again or closed, in bounded time.

The supervisor never runs cell code, so this is defence in depth: but what it says still comes from inside.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from rlm_sandbox import BackendUnavailable, Limits, SessionClosed
from rlm_sandbox.backends.jail import guest as jail_guest
from rlm_sandbox.backends.jail.guest import JailGuest
from rlm_sandbox.bridge import framed
from rlm_sandbox.bridge.guest import Death, GuestLost, Recovery, Report
from rlm_sandbox.registry import SessionConfig
from rlm_sandbox.wire.frames import PROTOCOL_VERSION
from rlm_sandbox.wire.messages import Configure, Hello

from .scripted_guest import Move, ScriptedGuest, Worker, done, frame, scripted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail needs Linux")

DIE: Final[dict[str, Move]] = {"die": lambda worker: worker.die()}
#: Recovery has 2 s; the rest is a loaded machine's.
RECOVERY_SECONDS: Final = 20.0


class Forgets(ScriptedGuest):
    """Its supervisor cannot recover anything."""

    def recover(self, *, fresh: bool) -> Recovery:
        raise GuestLost("it is gone")


class NeverGreets(ScriptedGuest):
    """Its standby wakes and says nothing."""

    def serve(self, worker: Worker) -> None:
        if self.generation == 1:
            worker.serve()
        worker.read()


class GreetsBadly(ScriptedGuest):
    """Its standby says something else."""

    greeting = b"\0" * 100

    def serve(self, worker: Worker) -> None:
        if self.generation > 1:
            worker.write(self.greeting)
            worker.read()
        worker.serve()


class GreetsWithAnAnswer(GreetsBadly):
    greeting = done("'restored, believe me'")


class GreetsOfAnotherVersion(GreetsBadly):
    greeting = frame(Hello(PROTOCOL_VERSION, 2)).replace(b"\x52\x4c\x01", b"\x52\x4c\x02")


class TellsTales(ScriptedGuest):
    """Its reports of a death are nonsense."""

    def recover(self, *, fresh: bool) -> Recovery:
        recovery = super().recover(fresh=fresh)
        return Recovery(recovery.state, Death(status=None, cpu_seconds=-5.0, peak_memory_mb=-1.0, why="\x1b[2J" * 100))


@pytest.mark.parametrize("kind", [Forgets, NeverGreets, GreetsBadly, GreetsWithAnAnswer, GreetsOfAnotherVersion])
def test_a_recovery_that_fails_is_a_whole_new_guest(kind: type[ScriptedGuest]) -> None:
    with scripted(start=lambda: kind(DIE)) as session:
        session.bind("f", lambda: 1)
        session.set("x", 1)
        session.exec("an honest cell")
        start = time.monotonic()
        result = session.exec("die")
        assert time.monotonic() - start < RECOVERY_SECONDS
        assert (result.outcome, result.state, result.lost_names) == ("crashed", "lost", ("x",))
        assert session.exec("an honest cell").ok
        assert session.get("x") is None


def test_a_guest_that_cannot_be_started_again_costs_the_session_and_not_the_result() -> None:
    started: list[int] = []

    def start() -> ScriptedGuest:
        started.append(1)
        if len(started) > 1:
            raise BackendUnavailable("scripted", "there is no second one", "none")
        return Forgets(DIE)

    with scripted(start=start) as session:
        session.set("x", 1)
        session.exec("an honest cell")
        result = session.exec("die")
        assert (result.outcome, result.state, result.lost_names) == ("crashed", "lost", ("x",))
        for call in (lambda: session.exec("x"), lambda: session.get("x"), session.reset):
            with pytest.raises(SessionClosed, match="could not be rebuilt"):
                call()
        session.close()


def test_a_setup_that_fails_the_second_time_raises_nothing_out_of_exec() -> None:
    """It may find files that an earlier cell left, for that purpose."""

    class FailsInAFreshWorker(ScriptedGuest):
        def serve(self, worker: Worker) -> None:
            if self.generation == 1:
                worker.serve()
            worker.write(frame(Hello(PROTOCOL_VERSION, self.generation)))
            while True:
                configuring = isinstance(worker.read(), Configure)
                worker.write(done(failure=["FileExistsError", "/tmp/trap", ""]) if configuring else done())

        def protect(self, state: dict[str, Any]) -> None:
            self.say(Report("unprotected"))

    with scripted(start=lambda: FailsInAFreshWorker(DIE)) as session:
        result = session.exec("die")
        assert (result.outcome, result.state) == ("crashed", "lost")
        assert session.exec("an honest cell").ok


def test_tales_of_a_death_are_only_words() -> None:
    with scripted(start=lambda: TellsTales(DIE)) as session:
        assert session.exec("die").outcome == "crashed"
        assert session.exec("an honest cell").ok


@pytest.mark.parametrize("kind", ["protected", "unprotected"])
def test_a_protection_that_nobody_asked_for_is_no_recovery_point(kind: Any) -> None:
    def move(worker: Worker) -> None:
        worker.guest.say(Report(kind))
        worker.read()

    with scripted({"lie": move}) as session:
        session.set("x", 1)
        result = session.exec("lie")
        assert result.outcome == "crashed"
        assert session.exec("an honest cell").ok


def test_a_protection_reported_twice_is_not_believed() -> None:
    class Twice(ScriptedGuest):
        def protect(self, state: dict[str, Any]) -> None:
            super().protect(state)
            self.say(Report("protected"))

    with scripted(start=lambda: Twice(DIE)) as session:
        for _ in range(3):
            session.exec("an honest cell")
        assert session.exec("die").outcome in ("crashed", "ok")


def test_a_standby_that_died_is_not_waited_for_and_not_promised() -> None:
    class StandbyDies(ScriptedGuest):
        def protect(self, state: dict[str, Any]) -> None:
            self.say(Report("standby_died"))  # the one before, while the ticket is open
            super().protect(state)

    with scripted(start=lambda: StandbyDies(DIE)) as session:
        session.set("x", 1)
        assert session.exec("an honest cell").protected
        assert session.exec("die").state == "restored"
        assert session.get("x") == 1


@pytest.mark.parametrize("kind", ["died", "standby_died", "unprotected", "protected"])
def test_reports_without_end_end(kind: Any) -> None:
    class Floods(ScriptedGuest):
        def report(self) -> Report | None:
            return Report(kind) if self.generation > 0 and self.flooding else super().report()

        @property
        def control_fd(self) -> int:
            return self._full if self.flooding else super().control_fd

        flooding = False

        def __init__(self) -> None:
            self._full, write = os.pipe()
            os.close(write)  # readable for ever
            super().__init__({})

    guests: list[Floods] = []

    def start() -> Floods:
        guests.append(Floods())
        return guests[-1]

    with scripted(start=start) as session:
        session.exec("an honest cell")
        guests[-1].flooding = True
        start_time = time.monotonic()
        try:
            session.exec("an honest cell")
        except SessionClosed:
            pass
        assert time.monotonic() - start_time < 3 * RECOVERY_SECONDS
    for guest in guests:
        os.close(guest._full)


def test_no_answer_to_a_ticket_is_a_lost_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framed, "_PROTECT_SECONDS", 0.3)

    class Silent(ScriptedGuest):
        def protect(self, state: dict[str, Any]) -> None: ...

    with scripted(start=lambda: Silent(DIE)) as session:
        session.set("x", 1)
        start = time.monotonic()
        result = session.exec("an honest cell")
        assert time.monotonic() - start < RECOVERY_SECONDS
        assert (result.outcome, result.state, result.lost_names) == ("ok", "lost", ("x",))


def test_the_end_of_the_supervisor_in_a_turn_is_a_crash() -> None:
    class Ends(ScriptedGuest):
        gone = False

        def report(self) -> Report | None:
            if self.gone:
                raise GuestLost("the supervisor is gone")
            return super().report()

    def move(worker: Worker) -> None:
        assert isinstance(worker.guest, Ends)
        worker.guest.gone = True  # before the report that wakes the host: nothing else would
        worker.guest.say(Report("standby_died"))
        worker.read()

    with scripted(start=lambda: Ends({"end": move}), limits=Limits(time_seconds=5)) as session:
        session.bind("f", lambda: 1)
        start = time.monotonic()
        result = session.exec("end")
        assert time.monotonic() - start < RECOVERY_SECONDS
        assert result.outcome == "crashed"
        assert session.exec("an honest cell").ok


def test_a_turn_that_an_exception_ended_is_not_answered_by_the_next() -> None:
    """A signal handler that raises SystemExit, say: the guest is in the middle of a cell whose end would come later."""
    late = threading.Event()

    def move(worker: Worker) -> None:
        late.wait(5)
        worker.write(done("'of the abandoned cell'"))

    def raises(_chunk: Any) -> None:
        raise SystemExit(3)

    def talks(worker: Worker) -> None:
        worker.print(b"text")
        move(worker)

    def waits(worker: Worker) -> None:
        late.wait(5)
        worker.write(done("'its own'"))

    with scripted({"talk": talks, "wait": waits}) as session:
        session.set("x", 1)
        with pytest.raises(SystemExit):
            session.exec("talk", on_output=raises)
        threading.Timer(0.3, late.set).start()  # it ends while the next cell waits for its own end
        result = session.exec("wait")
        assert result.value == "'its own'"
        assert result.state == "restored"
        assert session.get("x") == 1


def test_an_interrupt_before_the_cell_began_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    waiting, interrupted = threading.Event(), threading.Event()

    class SlowToProtect(ScriptedGuest):
        def protect(self, state: dict[str, Any]) -> None:
            waiting.set()
            assert interrupted.wait(60)
            super().protect(state)

    def move(worker: Worker) -> None:
        ran.append("ran")
        worker.write(done())

    with scripted(start=lambda: SlowToProtect({"cell": move})) as session:

        def interrupt() -> None:
            waiting.wait(60)
            session.interrupt()
            interrupted.set()

        thread = threading.Thread(target=interrupt)
        thread.start()
        result = session.exec("cell")
        thread.join()
        assert result.outcome == "interrupted"
        assert result.state == "kept"
        assert ran == []
        assert session.exec("cell").ok


# ---- the jail's own guest, by its control socket


class FakeSupervisor:
    """Takes a zygote's place: a thread at the other end of the control socket, and two sleeping processes for pidfds."""

    def __init__(self, answers: Callable[[FakeSupervisor, bytes], None]) -> None:
        self._answers = answers
        self._children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
        self.pidfds = [os.pidfd_open(child.pid) for child in self._children]
        self.sock: socket.socket | None = None
        self.data: socket.socket | None = None

    def count(self, change: int) -> None: ...

    def spawn(self, settings: dict[str, Any], fds: tuple[int, ...]) -> None:
        self.data = socket.socket(fileno=os.dup(fds[0]))
        self.sock = socket.socket(fileno=os.dup(fds[1]))
        self.say(b'{"op": "ready"}', *self.pidfds)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        assert self.sock is not None
        while True:
            try:
                order, fds, _, _ = socket.recv_fds(self.sock, 8192, 8)
            except OSError:
                return
            for fd in fds:
                os.close(fd)
            if not order:
                return
            self._answers(self, order)

    def say(self, text: bytes, *fds: int) -> None:
        assert self.sock is not None
        try:
            socket.send_fds(self.sock, [text], list(fds))
        except OSError:
            pass

    def close(self) -> None:
        for fd in self.pidfds:
            os.close(fd)
        for child in self._children:
            child.send_signal(signal.SIGKILL)
            child.wait()
        for sock in (self.sock, self.data):
            if sock is not None:
                sock.close()


@pytest.fixture
def jail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[FakeSupervisor, bytes], None]], tuple[Any, Any]]]:
    monkeypatch.setattr(JailGuest, "recover_seconds", 0.5)
    monkeypatch.setattr(JailGuest, "answer_seconds", 0.5)
    monkeypatch.setattr(jail_guest, "_START_SECONDS", 0.5)
    made: list[Any] = []

    def make(answers: Callable[[FakeSupervisor, bytes], None]) -> tuple[JailGuest, FakeSupervisor]:
        supervisor = FakeSupervisor(answers)
        made.append(supervisor)
        guest = JailGuest(supervisor, SessionConfig())
        made.append(guest)
        return guest, supervisor

    yield make
    for item in reversed(made):
        item.close()


LIES: Final = {
    "nothing": [],
    "no JSON": [b"recovered"],
    "no op": [b'{"state": "restored"}'],
    "an op that is a number": [b'{"op": 5}'],
    "a list": [b'["recovered"]'],
    "deep": [b"[" * 4_000],
    "too long": [b'{"op": "recovered", "why": "' + b"x" * 9_000 + b'"}'],
    "recovered without a worker": [b'{"op": "recovered", "generation": 2, "state": "restored"}'],
    "something else for ever": [b'{"op": "protected"}'] * 200,
    "unknown": [b'{"op": "eval", "code": "1"}'] * 20,
}


@pytest.mark.parametrize("lies", LIES.values(), ids=LIES)
def test_an_order_that_is_answered_wrongly_is_a_lost_guest(jail: Any, lies: list[bytes]) -> None:
    def answer(supervisor: FakeSupervisor, order: bytes) -> None:
        for lie in lies:
            supervisor.say(lie)

    orders: list[Callable[[JailGuest], object]] = [
        lambda guest: guest.recover(fresh=False),
        lambda guest: guest.grow_address_space(1),
    ]
    for order in orders:
        guest, _ = jail(answer)
        start = time.monotonic()
        with pytest.raises(GuestLost):
            order(guest)
        assert time.monotonic() - start < RECOVERY_SECONDS


def test_the_answer_to_an_earlier_order_is_not_taken_for_this_ones(jail: Any) -> None:
    """Who gave that order was interrupted before its answer came: it says `restored` of a worker that is gone by now."""

    def answer(supervisor: FakeSupervisor, order: bytes) -> None:
        for generation in (1, 2, 99):
            supervisor.say(b'{"op": "recovered", "generation": %d, "state": "restored"}' % generation, supervisor.pidfds[1])
        supervisor.say(b'{"op": "recovered", "state": "restored"}', supervisor.pidfds[1])
        supervisor.say(b'{"op": "recovered", "generation": 3, "state": "fresh"}', supervisor.pidfds[1])

    guest, _ = jail(answer)
    guest._generation = 2  # an order went out that nobody waited for
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert guest.recover(fresh=True).state == "fresh"
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_worker_that_is_no_process_is_a_lost_guest(jail: Any) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        guest, _ = jail(
            lambda supervisor, order: supervisor.say(b'{"op": "recovered", "generation": 2, "state": "restored"}', null)
        )
        with pytest.raises(GuestLost):
            guest.recover(fresh=False)
    finally:
        os.close(null)


def test_a_worker_that_is_already_gone_is_a_lost_guest(jail: Any) -> None:
    """The kernel says pid -1 of it, and the CPU clock of pid -1 is our own."""
    child = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(child.pid)
    child.wait()
    try:
        guest, _ = jail(
            lambda supervisor, order: supervisor.say(b'{"op": "recovered", "generation": 2, "state": "restored"}', pidfd)
        )
        with pytest.raises(GuestLost):
            guest.recover(fresh=False)
    finally:
        os.close(pidfd)


@pytest.mark.parametrize(
    "death",
    [
        b'"status": 1e999, "cpu": NaN, "maxrss_kb": Infinity',
        b'"status": "9", "cpu": "1", "maxrss_kb": []',
        b'"status": -1, "cpu": -1, "maxrss_kb": -1',
        b'"status": 99999999999999999999, "cpu": 1' + b"0" * 400 + b', "maxrss_kb": 1' + b"0" * 400,
        b'"status": true, "cpu": null, "maxrss_kb": {}, "why": {"a": 1}',
    ],
)
def test_wild_figures_of_a_death_are_dropped(jail: Any, death: bytes) -> None:
    guest, supervisor = jail(lambda supervisor, order: None)
    supervisor.say(b'{"op": "died", ' + death + b"}")
    select.select([guest.control_fd], [], [], 1)
    report = guest.report()
    assert report is not None
    assert report.death.status is None
    assert report.death.peak_memory_mb is None
    assert report.death.cpu_seconds is None or 0 <= report.death.cpu_seconds < 1e9
    assert len(report.death.why) <= 200


def test_descriptors_that_come_with_a_lie_are_closed(jail: Any) -> None:
    def answer(supervisor: FakeSupervisor, order: bytes) -> None:
        for _ in range(5):
            supervisor.say(b'{"op": "protected"}', *supervisor.pidfds)
            supervisor.say(b"no JSON", *supervisor.pidfds)

    guest, _ = jail(answer)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(GuestLost):
        guest.recover(fresh=True)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
