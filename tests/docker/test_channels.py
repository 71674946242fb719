"""The two ways between a session and its container: which is taken, what becomes of the other, and what only one of them has."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox import BackendUnavailable, Context, DockerOptions, Limits, REPLProtocol, SessionPool, open_repl
from rlm_sandbox.backends.docker import contexts, socket_guest
from rlm_sandbox.backends.docker.attached_guest import AttachedGuest
from rlm_sandbox.backends.docker.container import USER_ID
from rlm_sandbox.backends.docker.engine import engine_for, own_name
from rlm_sandbox.backends.docker.session_container import SessionContainer, settings_for
from rlm_sandbox.backends.docker.socket_guest import SocketGuest
from rlm_sandbox.bridge import supervised
from rlm_sandbox.bridge.guest import GuestLost
from rlm_sandbox.runners.container import HOST_SOCKET

from ..ordinary_user import copied, interpreter
from .conftest import ours, until

#: Neither root nor the containers' user.
SOMEBODY = 65533


@pytest.fixture(autouse=True)
def forgetful(api: Any) -> Iterator[None]:
    """What a test makes the engine's client believe is its own."""
    engine = engine_for(None)
    yield
    engine.shares_sockets = True


def _guest(repl: REPLProtocol) -> object:
    return repl._guest  # type: ignore[attr-defined]


def _works(repl: REPLProtocol) -> None:
    repl.bind("ctx", Context.from_text("hay needle " * 1000))
    repl.bind("ask", lambda text: text.upper())
    assert repl.exec("ask(ctx.find('needle')[0][2]), print('said')").stdout == "said\n"
    assert repl.exec("x = ctx.find('needle')[0][2]").ok
    assert repl.exec("import os\nx = None\nos._exit(1)").state == "restored"
    assert repl.exec("x").value == "'needle'"


def test_a_local_engine_is_spoken_past(api: Any) -> None:
    with open_repl("docker") as repl:
        assert isinstance(_guest(repl), SocketGuest)
        _works(repl)


def test_the_attached_stream_can_be_asked_for(api: Any) -> None:
    with open_repl("docker", options=DockerOptions(channel="attached")) as repl:
        assert isinstance(_guest(repl), AttachedGuest)
        _works(repl)
    with pytest.raises(ValueError, match=r"DockerOptions\.channel must be 'auto' or 'attached', got 'socket'"):
        DockerOptions(channel="socket")  # type: ignore[arg-type]


def test_a_named_runtime_has_the_attached_stream(api: Any) -> None:
    with open_repl("docker", options=DockerOptions(runtime="runsc")) as repl:
        assert isinstance(_guest(repl), AttachedGuest)


def _out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The container finds a socket that it may not connect to, as under a policy of SELinux."""
    listen = contexts.SessionDirectory.listen

    def closed(directory: contexts.SessionDirectory) -> socket.socket:
        listener = listen(directory)
        (directory.path / HOST_SOCKET).chmod(0o600)
        return listener

    monkeypatch.setattr(contexts.SessionDirectory, "listen", closed)


def _absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is there and the socket is not, as in a virtual machine that shares files only."""
    listen = contexts.SessionDirectory.listen

    def unlinked(directory: contexts.SessionDirectory) -> socket.socket:
        listener = listen(directory)
        (directory.path / HOST_SOCKET).unlink()
        return listener

    monkeypatch.setattr(contexts.SessionDirectory, "listen", unlinked)


def _unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is in a pid namespace beside the container's."""

    def unseen(_pidfd: int) -> int:
        raise GuestLost("a pidfd has no pid")

    monkeypatch.setattr(supervised, "_host_pid", unseen)


def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's /proc shows this user no other users' processes (hidepid)."""
    monkeypatch.setattr(supervised.SupervisedGuest, "memory_headroom_mb", lambda _guest: None)


@pytest.mark.parametrize(
    ("hinder", "word"),
    [
        (_out_of_reach, "cannot connect to its host (Permission denied)"),
        (_absent, "cannot connect to its host (No such file or directory)"),
        (_unseen, "cannot be seen and measured from here"),
        (_unmeasured, "cannot be seen and measured from here"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[1:],
)
def test_where_sockets_cannot_be_the_attached_stream_is_taken(
    api: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hinder: Any, word: str
) -> None:
    """It is tried once for a process and said in the log, and nothing of the attempt is left."""
    if hinder is _out_of_reach and os.getuid() == 65534:
        pytest.skip("the container's user is this one")
    hinder(monkeypatch)
    with caplog.at_level(logging.WARNING, "rlm_sandbox.docker"):
        with open_repl("docker") as repl:
            assert isinstance(_guest(repl), AttachedGuest)
            _works(repl)
            until(lambda: len(ours(api, own_name())) == 1)
        assert word in caplog.text
        caplog.clear()
        with open_repl("docker") as repl:
            assert isinstance(_guest(repl), AttachedGuest)
        assert not caplog.records
    until(lambda: not ours(api, own_name()))
    assert contexts._root is not None
    assert not list(contexts._root.glob("session-*"))


def test_what_keeps_either_way_from_starting_is_not_the_sockets_fault(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that way is tried again the next time."""

    def confined_badly(*_args: Any, **_keywords: Any) -> None:
        raise GuestLost("a step of its confinement failed: no")

    _absent(monkeypatch)
    monkeypatch.setattr(AttachedGuest, "_say_hello", confined_badly)
    with pytest.raises(BackendUnavailable, match="a step of its confinement failed"):
        open_repl("docker")
    monkeypatch.undo()
    with open_repl("docker") as repl:
        assert isinstance(_guest(repl), SocketGuest)
    until(lambda: not ours(api, own_name()))


def test_one_that_is_killed_while_it_starts_does_not_change_the_way(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SessionContainer.start

    def killed(container: SessionContainer) -> None:
        start(container)
        api.kill(container._id)

    monkeypatch.setattr(SessionContainer, "start", killed)
    with pytest.raises(BackendUnavailable, match="a container did not start"):
        open_repl("docker")
    monkeypatch.undo()
    with open_repl("docker") as repl:
        assert isinstance(_guest(repl), SocketGuest)


def test_a_policy_that_keeps_descriptors_back(api: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The container connects, and does not get what it is sent: it says so, and the other way is taken."""
    send = SocketGuest._order
    monkeypatch.setattr(SocketGuest, "_order", lambda guest, message, fds=(): send(guest, message))
    with caplog.at_level(logging.WARNING, "rlm_sandbox.docker"), open_repl("docker") as repl:
        assert isinstance(_guest(repl), AttachedGuest)
        _works(repl)
    assert "has kept back the descriptors" in caplog.text


def test_a_step_of_the_confinement_that_fails_is_named(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By sockets, too: more memory than the kernel takes for a limit."""
    monkeypatch.setattr(socket_guest, "settings_for", lambda limits: {**settings_for(limits), "memory_mb": 1 << 62})
    with pytest.raises(BackendUnavailable, match="a step of its confinement failed"):
        open_repl("docker")
    assert engine_for(None).shares_sockets


def test_the_containers_own_user_has_the_attached_stream(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would own the memory file of a context that is sent to a container."""
    monkeypatch.setattr(os, "geteuid", lambda: USER_ID)
    with open_repl("docker") as repl:
        assert isinstance(_guest(repl), AttachedGuest)


def test_a_host_without_descriptors_is_told_so(api: Any) -> None:
    with open_repl("docker") as warm:  # what is imported and connected once
        assert warm.exec("1").ok
    low, high = resource.getrlimit(resource.RLIMIT_NOFILE)
    for free in range(0, 16, 3):
        taken = [os.dup(0) for _ in range(3)]
        most = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
        resource.setrlimit(resource.RLIMIT_NOFILE, (most + 1, high))
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        for _ in range(min(free, len(taken))):
            os.close(taken.pop())
        try:
            with open_repl("docker") as repl:
                assert repl.exec("1").ok
        except BackendUnavailable:
            pass  # never an OSError
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (low, high))
    until(lambda: not ours(api, own_name()))
    assert contexts._root is not None
    assert not list(contexts._root.glob("session-*"))


@pytest.mark.parametrize("channel", ["auto", "attached"])
def test_ctrl_c_while_a_container_is_replaced_loses_the_state_and_not_the_session(api: Any, channel: Any) -> None:
    with open_repl("docker", options=DockerOptions(channel=channel)) as repl:
        repl.bind("f", lambda: 7)
        assert repl.exec("x = 1").ok
        start = repl._start  # type: ignore[attr-defined]

        def interrupted() -> None:
            raise KeyboardInterrupt

        repl._start = interrupted  # type: ignore[attr-defined]
        api.kill(ours(api, own_name())[0]["Id"])
        with pytest.raises(KeyboardInterrupt):
            repl.exec("x")
        repl._start = start  # type: ignore[attr-defined]
        after = repl.exec("f()")
        assert (after.value, after.state, after.lost_names) == ("7", "lost", ("x",))
        assert repl.exec("f()").state == "kept"


def test_a_child_forked_while_a_context_is_stored_opens_sessions(api: Any) -> None:
    """The lock may be held by a thread that the child does not have."""
    with contexts._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            try:
                with open_repl("docker") as repl:
                    os._exit(0 if repl.exec("6 * 7").value == "42" else 2)
            finally:
                os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status == 0


def test_nobody_else_ever_connects(api: Any) -> None:
    """While a session runs, there is no name and no listening end of the socket by which it began."""
    with open_repl("docker") as repl:
        assert contexts._root is not None
        assert not list(contexts._root.glob("session-*"))
        listening = [line for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(f"/{HOST_SOCKET}")]
        # The host's end of the connection still has that name; the kernel's flag of a listening socket is __SO_ACCEPTCON.
        assert not [line for line in listening if int(line.split()[3], 16) & 1 << 16]
        assert repl.exec("import os\nos.listdir('/ctx')").value == "[]"


def test_a_worker_sends_no_descriptors(api: Any) -> None:
    """On their way they count against the user of all containers, and could keep other sessions from being recovered."""
    with open_repl("docker") as repl:
        result = repl.exec(
            "import array, os, socket\n"
            "def kind(fd):\n    try: return os.fstat(fd).st_mode >> 12\n    except OSError: return 0\n"
            "channel = next(fd for fd in range(3, 64) if kind(fd) == 12)\n"
            "socket.socket(fileno=os.dup(channel)).sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))])\n"
        )
        assert result.error == "PermissionError: [Errno 1] Operation not permitted"
        assert repl.exec("1").value == "1"


# ---- signals by order, for hosts that may not send them


@pytest.fixture
def ordered(api: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[REPLProtocol]:
    """A session whose host the kernel does not let signal another user's process."""

    def refused(_pidfd: int, _number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(signal, "pidfd_send_signal", refused)
    with open_repl("docker", limits=Limits(time_seconds=1.0)) as repl:
        guest = _guest(repl)
        assert isinstance(guest, SocketGuest)
        assert not guest._may_signal
        yield repl


def test_signals_by_order(ordered: REPLProtocol) -> None:
    _works(ordered)
    soft = ordered.exec("y = 1\nwhile True: pass")
    assert (soft.outcome, soft.state) == ("limit", "kept")
    hard = ordered.exec("y = 2\ntry:\n    while True:\n        z = 1\nexcept BaseException:\n    while True:\n        z = 2")
    assert (hard.outcome, hard.state) == ("limit", "restored")
    assert ordered.exec("x, y").value == "('needle', 1)"
    threading.Timer(0.3, ordered.interrupt).start()
    assert ordered.exec("while True: pass").outcome == "interrupted"


def test_between_turns_a_worker_is_stopped_by_order(ordered: REPLProtocol) -> None:
    ordered.exec(
        "import threading\nn = 0\ndef count():\n    global n\n    while True: n += 1\nthreading.Thread(target=count, daemon=True).start()"
    )
    pid = _guest(ordered)._worker_pid  # type: ignore[attr-defined]
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    before = time.clock_gettime((~pid << 3) | 2)
    time.sleep(0.5)
    assert time.clock_gettime((~pid << 3) | 2) == before


def test_no_other_signal_can_be_ordered(ordered: REPLProtocol) -> None:
    """Defence in depth: the supervisor takes such an order for the end of the session."""
    guest = _guest(ordered)
    assert isinstance(guest, SocketGuest)
    guest._order({"op": "signal", "number": int(signal.SIGTERM)})
    assert ordered.exec("1").state == "lost"
    assert ordered.exec("2").value == "2"


_SCRIPT = """
import json, os
from rlm_sandbox import Context, Limits, open_repl
with open_repl("docker", limits=Limits(time_seconds=2, memory_mb=128)) as repl:
    guest = repl._guest
    repl.bind("ctx", Context.from_text("hay needle " * 1000))
    repl.bind("ask", lambda text: text.upper())
    first = repl.exec("hits = ctx.find('needle')\\nask(hits[0][2]), len(ctx)")
    soft = repl.exec("while True: pass")
    killed = repl.exec("import os\\nhits = None\\nos._exit(1)")
    after = repl.exec("hits[0][2]")
    full = repl.exec("data = bytearray(1 << 30)")
    print(json.dumps([
        os.getuid(), type(guest).__name__, guest._may_signal, first.value, soft.state, killed.state, after.value, full.error,
        first.usage.cpu_seconds is not None,
    ]))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_of_the_engine(api: Any) -> None:
    """Whose group the engine's socket has, and who may not signal what runs in a container."""
    group = Path("/var/run/docker.sock").stat().st_gid
    packages = ("rlm_sandbox", "docker", "requests", "urllib3", "certifi", "idna", "charset_normalizer")
    with copied(*packages) as directory:
        done = subprocess.run(
            [interpreter(), "-c", _SCRIPT],
            env={"PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
            user=SOMEBODY,
            group=SOMEBODY,
            extra_groups=[group],
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        SOMEBODY, "SocketGuest", False, "('NEEDLE', 11000)", "kept", "restored", "'needle'", "MemoryError: out of memory", True,
    ]  # fmt: skip


def test_a_pool_of_either_kind(api: Any) -> None:
    for channel in ("auto", "attached"):
        with SessionPool("docker", size=1, ready=1, options=DockerOptions(channel=channel)) as pool, pool.open_repl() as repl:
            _works(repl)
    until(lambda: not ours(api, own_name()))
