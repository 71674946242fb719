"""Bytes that no honest guest sends, on a real session: it never crashes, hangs, executes or grows by more than its caps.

Whatever the guest does, ``exec`` returns a result within its deadline and its grace; the guest is dead, and the next cell
finds the session as it was before.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_sandbox import ExecResult, Limits
from rlm_sandbox.bridge.framed import FramedSession
from rlm_sandbox.bridge.guest import Report
from rlm_sandbox.wire.frames import PROTOCOL_VERSION
from rlm_sandbox.wire.messages import Forget, Hello, Resume

from .corpus import BREACHES, VALUE_BYTES
from .scripted_guest import Move, ScriptedGuest, Worker, done, frame, raw_frame, scripted

#: Beyond a deadline and its grace; a loaded machine takes a part of it.
SLACK_SECONDS: Final = 20.0


def attack(session: FramedSession, code: str = "attack", *, deadline: float = 0.0, **kwargs: Any) -> ExecResult:
    """Run the move as a cell, with something to lose before it."""
    session.set("kept", 7)
    start = time.monotonic()
    result = session.exec(code, **kwargs)
    took = time.monotonic() - start
    assert took < deadline + 0.25 + SLACK_SECONDS, f"took {took:.1f} s with a deadline of {deadline:.1f} s"
    return result


def assert_recovered(session: FramedSession, result: ExecResult, *outcomes: str) -> None:
    """The guest died of it and the session did not."""
    assert result.outcome in outcomes, f"{result.outcome}: {result.error}"
    assert result.state == "restored"
    assert session.get("kept") == 7
    assert session.exec("an honest cell").ok


def sends(data: bytes) -> Move:
    return lambda worker: worker.write(data)


@pytest.fixture(scope="module")
def breached() -> Iterator[FramedSession]:
    """One session for all breaches: it has to survive each."""
    with scripted({name: sends(data) for name, data in BREACHES.items()}, limits=Limits(value_bytes=VALUE_BYTES)) as session:
        session.bind("f", lambda: None)
        yield session


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_a_violation_and_costs_only_its_cell(breached: FramedSession, name: str) -> None:
    result = attack(breached, name)
    assert_recovered(breached, result, "violation")
    assert result.error is not None
    assert len(result.error) < 300, "the error quotes no bytes of the guest"
    assert result.read == {}
    assert result.value is None


def test_a_frame_truncated_at_every_byte_and_a_death_is_a_crash() -> None:
    whole = done("x", attachments=["text", b"raw"])
    moves: dict[str, Move] = {}
    for length in range(len(whole)):

        def move(worker: Worker, length: int = length) -> None:
            worker.write(whole[:length])
            worker.die()

        moves[str(length)] = move
    with scripted(moves) as session:
        for length in range(len(whole)):
            assert_recovered(session, attack(session, str(length)), "crashed")


@pytest.mark.parametrize("length", [0, 1, 11, 12, 30])
def test_a_channel_that_is_closed_without_a_death_is_a_violation(length: int) -> None:
    def move(worker: Worker) -> None:
        worker.write(done("x", attachments=["text"])[:length])
        worker.close()

    with scripted({"attack": move}) as session:
        assert_recovered(session, attack(session), "violation")


_SEED: Final = done("x", ["d", "y", ["l", 1, 2.5, ["a", 0]]], ["T", "m", "t"], False, ["a"], ["text é"])


@settings(max_examples=60)
@given(data=st.data())
def test_any_bytes_end_in_a_result(data: st.DataObject) -> None:
    changed = bytearray(_SEED)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    sent = bytes(changed) if data.draw(st.booleans()) else data.draw(st.binary(max_size=100))

    def move(worker: Worker) -> None:
        worker.write(sent)
        worker.die()

    with scripted({"attack": move}) as session:
        result = attack(session, read=("y",))
        assert result.outcome in ("ok", "error", "limit", "violation", "crashed")
        assert session.exec("an honest cell").ok


# ---- time


def slow(worker: Worker) -> None:
    for byte in done():
        worker.write(bytes([byte]))
        time.sleep(1)


def silent(worker: Worker) -> None:
    worker.read()


def endless(worker: Worker) -> None:
    """A frame within the cap, its bytes so small and so many that the channel is never empty."""
    worker.write(done(["a", 0], attachments=[b"x" * VALUE_BYTES])[:-1])
    worker.read()


def prints(worker: Worker) -> None:
    while True:
        worker.print(b"\x1b[2J" * 4_096)


def prints_one_by_one(worker: Worker) -> None:
    while True:
        worker.print(b"o")
        worker.print(b"e", "stderr")


@pytest.mark.parametrize("move", [slow, silent, endless, prints, prints_one_by_one])
def test_a_guest_that_never_ends_its_turn_is_ended_at_its_time(move: Move) -> None:
    with scripted({"attack": move}, limits=Limits(time_seconds=0.5, value_bytes=VALUE_BYTES)) as session:
        result = attack(session, deadline=0.5)
        assert_recovered(session, result, "limit")
        assert result.limit is not None
        assert result.limit.kind == "time_seconds"
        assert len(result.stdout) + len(result.stderr) < 3 * 64 * 1024


def test_a_guest_that_closed_its_outputs_does_not_keep_the_host_busy() -> None:
    """The end of a pipe is ready for ever: a loop that looks at it again and again would spin."""

    class Mute(ScriptedGuest):
        def __init__(self, moves: dict[str, Move]) -> None:
            super().__init__(moves)
            for fd in self.prints.values():
                os.close(fd)
            self.prints.clear()

    with scripted(start=lambda: Mute({"attack": silent}), limits=Limits(time_seconds=1)) as session:
        busy = time.thread_time()
        result = attack(session, deadline=1)
        assert time.thread_time() - busy < 0.5
        assert_recovered(session, result, "limit")


def test_deadlines_of_months_are_no_error() -> None:
    """The poll call takes milliseconds as a C int, which 25 days overflow."""
    forever = Limits(time_seconds=10_000_000, wall_seconds=10_000_000, session_seconds=10_000_000)
    with scripted(limits=forever) as session:
        assert session.exec("an honest cell").ok
    with scripted(limits=Limits(time_seconds=None, wall_seconds=None, session_seconds=None)) as session:
        assert session.exec("an honest cell").ok


# ---- turns


def test_what_comes_between_turns_costs_no_cell() -> None:
    for extra in (done(), done()[:5], frame(["suspend", [], False]), b"\0"):

        def move(worker: Worker, extra: bytes = extra) -> None:
            worker.write(done("'first'"))
            worker.read()
            worker.guest.protect(worker.state)
            worker.write(extra)

        with scripted({"attack": move}) as session:
            assert attack(session).ok
            time.sleep(0.05)
            second = session.exec("an honest cell")
            assert second.outcome == "ok"
            assert second.value is None, "the answer to one cell was taken for the next one's"
            assert second.state == "restored"
            assert session.get("kept") == 7


def test_an_answer_before_the_request_was_read_is_a_violation() -> None:
    class Hasty(ScriptedGuest):
        def serve(self, worker: Worker) -> None:
            if self.generation > 1:
                worker.serve()
            worker.write(frame(Hello(PROTOCOL_VERSION, 1)))
            worker.read()
            worker.write(done())
            worker.read()
            self.protect(worker.state)
            worker.sock.recv(1)
            worker.write(done("'too early'"))
            worker.sock.recv(1 << 30, socket.MSG_WAITALL)

    with scripted(start=lambda: Hasty({})) as session:
        result = session.exec("#" * (8 << 20))
        assert result.outcome == "violation"
        assert session.exec("an honest cell").ok


@pytest.mark.parametrize("length", [1, 12, None])
def test_an_end_while_the_host_holds_the_turn_is_a_violation(length: int | None) -> None:
    entered, release = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        release.wait(20)

    def move(worker: Worker) -> None:
        worker.write(frame(["suspend", [[1, 1, None, ["l"], ["d"]]], False]))
        entered.wait(20)
        worker.write(done("'forged'")[:length])
        worker.read()

    with scripted({"attack": move}) as session:
        session.bind("wait", wait)
        try:
            result = attack(session)
            assert_recovered(session, result, "violation")
            assert result.value is None
        finally:
            release.set()


def test_a_number_of_an_earlier_suspension_is_a_violation() -> None:
    def move(worker: Worker) -> None:
        worker.call([7, 1, None, ["l"], ["d"]])
        worker.call([7, 1, None, ["l"], ["d"]])

    calls: list[int] = []
    with scripted({"attack": move}) as session:
        session.bind("f", lambda: calls.append(1))
        assert_recovered(session, attack(session), "violation")
    assert calls == [1]


def test_a_suspension_with_a_malformed_call_runs_none_of_its_calls() -> None:
    calls: list[int] = []
    good: list[Any] = [1, 1, None, ["l"], ["d"]]
    with scripted({"attack": sends(frame(["suspend", [good, [2, 1, None, ["x"], ["d"]]], False]))}) as session:
        session.bind("f", lambda: calls.append(1), inline=True)
        assert_recovered(session, attack(session), "violation")
    assert calls == []


@pytest.mark.parametrize("handle", [0, -1, 2, 10**30, 10**4_000], ids=["0", "-1", "2", "10**30", "10**4000"])
def test_unknown_handles_are_refused(handle: int) -> None:
    def move(worker: Worker) -> None:
        answer = worker.call([1, handle, None, ["l"], ["d"]], [10**30, handle, "__class__", ["l"], ["d"]])
        assert isinstance(answer, Resume)
        worker.write(done(str(answer.answers)[:20_000]))

    with scripted({"attack": move}) as session:
        session.bind("f", lambda: "secret")
        result = attack(session)
        assert result.ok
        assert "HostCallError" in (result.value or "")
        assert "secret" not in (result.value or "")


def test_the_answers_and_handles_of_another_session_are_worth_nothing() -> None:
    """One guest sends what another one was told: its own session refuses or ignores it, the other never hears of it."""
    heard: list[str] = []
    told: list[Resume] = []

    def first(worker: Worker) -> None:
        answer = worker.call([1, 3, None, ["l"], ["d"]])
        assert isinstance(answer, Resume)
        told.append(answer)
        worker.write(done())

    def second(worker: Worker) -> None:
        refusal = worker.call([1, 3, None, ["l"], ["d"]])
        assert isinstance(refusal, Resume)
        assert refusal.answers[0][2] is not None
        worker.write(frame(told[0]))  # the other one's resume, as an event

    with scripted({"attack": first}) as one, scripted({"attack": second}) as other:
        for n in range(3):
            one.bind(f"f{n}", lambda n=n: heard.append(f"one {n}"))
        other.bind("g", lambda: heard.append("other"))
        assert attack(one).ok
        assert_recovered(other, attack(other), "violation")
        assert one.exec("an honest cell").ok
    assert heard == ["one 2"]


# ---- floods


def test_polling_without_end_is_slow_and_bounded_by_the_clock() -> None:
    release = threading.Event()
    polls: list[int] = []

    def move(worker: Worker) -> None:
        worker.call([1, 1, None, ["l"], ["d"]], more=True)
        while not isinstance(worker.call(more=True), Forget):
            polls.append(1)

    with scripted({"attack": move}, limits=Limits(wall_seconds=1)) as session:
        session.bind("never", release.wait)
        try:
            result = attack(session, deadline=1)
            assert result.outcome == "limit"
            assert len(polls) < 200, "an empty suspension is answered at growing intervals"
        finally:
            release.set()


def test_a_flood_of_calls_ends_at_the_limit() -> None:
    calls: list[int] = []

    def move(worker: Worker) -> None:
        for start in range(1, 1 << 30, 1_000):
            worker.call(*([n, 1, None, ["l"], ["d"]] for n in range(start, start + 1_000)))

    with scripted({"attack": move}, limits=Limits(host_calls=2_500)) as session:
        session.bind("f", lambda: calls.append(1))
        result = attack(session)
        assert_recovered(session, result, "limit")
        assert result.limit is not None
        assert result.limit.kind == "host_calls"
    assert len(calls) <= 2_500


def test_calls_that_have_not_begun_when_their_cell_ends_never_do() -> None:
    """Else a dead cell goes on spending the model's budget."""
    begun: list[int] = []
    release = threading.Event()

    def blocks() -> None:
        begun.append(1)
        release.wait(20)

    def move(worker: Worker) -> None:
        worker.call(*([n, 1, None, ["l"], ["d"]] for n in range(1, 1_001)))

    with scripted({"attack": move}, limits=Limits(wall_seconds=0.5)) as session:
        session.bind("f", blocks)
        assert attack(session, deadline=0.5).outcome == "limit"
        release.set()
        time.sleep(0.3)
        assert len(begun) <= 64
        assert session.exec("an honest cell").ok


def grown(do: Callable[[], object]) -> int:
    """How many bytes the process had more at its worst while it did that."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        do()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


_MB: Final = 1 << 20


@pytest.mark.parametrize(
    "name",
    [
        "a header of 4 GB announced",
        "10 GB announced",
        "10 GB of text announced",
        "four billion attachments announced",
        "deep nesting",
    ],
)
def test_what_is_only_announced_is_never_allocated(name: str) -> None:
    with scripted({"attack": sends(BREACHES[name])}) as session:
        assert grown(lambda: attack(session)) < 4 * _MB


def test_arguments_of_calls_that_wait_are_bounded_together() -> None:
    """A guest repeats one large argument in call after call, while the host function sits on the first."""
    release = threading.Event()
    refused: list[str] = []
    argument = b"x" * (VALUE_BYTES - 10_000)

    def move(worker: Worker) -> None:
        for number in range(1, 300):
            suspension = frame(["suspend", [[number, 1, None, ["l", ["a", 0]], ["d"]]], True], [argument])
            worker.write(suspension)
            answer = worker.read()
            if isinstance(answer, Forget):
                return
            assert isinstance(answer, Resume)
            refused.extend(error[1] for _, _, error in answer.answers if error)
        worker.write(done("'done'"))

    with scripted({"attack": move}, limits=Limits(value_bytes=VALUE_BYTES)) as session:
        session.bind("never", lambda _: release.wait(30))
        try:
            growth = grown(lambda: attack(session, deadline=8))
        finally:
            release.set()
    assert growth < 150 * _MB, f"{growth / _MB:.0f} MiB for a value_bytes of 1 MiB and 100 MB of elements"
    assert len(refused) > 100
    assert "too large together" in refused[0]


def test_an_honest_guest_has_room_for_many_calls_at_once() -> None:
    """64 prompts of 15 kB each, all of them waiting."""
    barrier = threading.Barrier(64)

    def move(worker: Worker) -> None:
        calls = [[n, 1, None, ["l", ["a", n - 1]], ["d"]] for n in range(1, 65)]
        answers: list[Any] = []
        message = worker.call(*calls, attachments=["p" * 15_000] * 64)
        while isinstance(message, Resume):
            answers += message.answers
            if len(answers) == 64:
                break
            message = worker.call()
        worker.write(done(str(sum(error is None for _, _, error in answers))))

    with scripted({"attack": move}) as session:
        session.bind("f", lambda prompt: barrier.wait(20) and None)
        assert attack(session, deadline=5).value == "64"


def test_a_million_names_are_cut() -> None:
    names = done(names=[f"n{number}" for number in range(400_000)])
    moves: dict[str, Move] = {"attack": sends(names), "die": lambda worker: worker.die()}

    class Forgetful(ScriptedGuest):
        def protect(self, state: dict[str, Any]) -> None:
            self.say(Report("unprotected"))

    with scripted(start=lambda: Forgetful(moves)) as session:
        assert grown(lambda: attack(session)) < 150 * _MB
        lost = session.exec("die")
        assert lost.state == "lost"
        assert len(lost.lost_names) == 10_000


# ---- words


def test_what_a_guest_says_is_valid_unicode_and_short() -> None:
    """A lone surrogate in an error text would make the person's terminal, file or model request fail."""
    words = ["\ud800" + "T" * 999, "\ud800" * 9_000, "\udfff" * 99_000]
    moves: dict[str, Move] = {
        "failure": sends(raw_frame(json.dumps(["done", None, None, words, False, ["\ud800"]]).encode())),
        "value": sends(done(["a", 0], attachments=["\ud800" + "v" * 50_000])),
        "die": lambda worker: worker.die(),
    }
    with scripted(moves) as session:
        result = session.exec("failure")
        assert result.outcome == "error"
        for text in (result.error, result.traceback):
            assert text is not None
            text.encode()
            assert len(text) < 200_000
        value = session.exec("value").value
        assert value is not None
        value.encode()
        assert len(value) < 21_000
        lost = session.exec("die")
        assert lost.state == "restored"
