"""The life of a session's container: nothing is left behind, however the session, the container or the host ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox import BackendUnavailable, Context, Limits, REPLProtocol, cli, open_repl
from rlm_sandbox.backends.docker import contexts
from rlm_sandbox.backends.docker.engine import own_name
from rlm_sandbox.options import DockerOptions
from rlm_sandbox.registry import prune

from .conftest import ours, until


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("count", "options"), [(50, DockerOptions()), (25, DockerOptions(channel="attached"))], ids=["auto", "attached"]
)
def test_many_sessions_leave_nothing(api: Any, count: int, options: DockerOptions) -> None:
    for _ in range(12):  # docker-py keeps up to ten connections to the engine open for later requests
        with open_repl("docker", recovery=False, options=options) as repl:
            repl.exec("x = 1")
    gc.collect()
    threads, descriptors = threading.active_count(), _descriptors()
    volumes = len(api.volumes()["Volumes"] or [])
    context = Context.from_text("text " * 1000)
    for _ in range(count):
        with open_repl("docker", recovery=False, options=options) as repl:
            repl.bind("P", context.whole)
            assert repl.exec("len(P)").value == "5000"
    until(lambda: not ours(api, own_name()))
    until(lambda: threading.active_count() <= threads)
    gc.collect()
    assert _descriptors() <= descriptors + 10  # docker-py's, if it kept fewer before; one for each session would be more
    assert len(api.volumes()["Volumes"] or []) == volumes
    del repl, context
    gc.collect()
    assert contexts._root is not None
    assert list(contexts._root.iterdir()) == []


_HOST = """
import sys, time
from rlm_sandbox import DockerOptions, open_repl
from rlm_sandbox.backends.docker.engine import own_name
sessions = [open_repl("docker", options=DockerOptions(channel={channel!r})) for _ in range(2)]
sessions[0].exec("x = 1")
print(own_name(), flush=True)
{then}
"""
_FORKED = """
import os
if os.fork() == 0:
    time.sleep(60)  # outlives the host with a copy of everything it had open
    os._exit(0)
time.sleep(600)
"""


@pytest.mark.parametrize("channel", ["auto", "attached"])
@pytest.mark.parametrize(
    "then", ["time.sleep(600)", "sessions[0].exec('while True: pass')", _FORKED], ids=["idle", "busy", "forked"]
)
def test_a_killed_host_leaves_no_container(api: Any, then: str, channel: str) -> None:
    host = subprocess.Popen([sys.executable, "-c", _HOST.format(then=then, channel=channel)], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    try:
        owner = host.stdout.readline().strip()
        assert len(ours(api, owner)) == 2
    finally:
        time.sleep(0.5)
        host.send_signal(signal.SIGKILL)
        host.wait()
        host.stdout.close()
    # Their standard input, or their socket, ends with the host, and so do they: no sweep is needed.
    until(lambda: not ours(api, owner), 10.0)
    prune("docker")
    assert not [path for path in contexts._base().glob("rlm-sandbox-docker.*") if owner in path.name]


_ENDING = """
import threading, time
import docker
from rlm_sandbox import SessionPool
from rlm_sandbox.backends.docker.engine import own_name
pool = SessionPool("docker", size=4, ready=4)
start, created = docker.APIClient.start, threading.Event()
def slowly(*args, **keywords):
    created.set()
    time.sleep(0.5)
    return start(*args, **keywords)
docker.APIClient.start = slowly
print(own_name(), flush=True)
created.wait()
"""


def test_a_process_that_ends_while_it_opens_sessions_leaves_nothing(api: Any) -> None:
    """A pool's thread opens them. A container that was created but not started has no standard input to lose."""
    ended = subprocess.run([sys.executable, "-c", _ENDING], stdout=subprocess.PIPE, text=True, check=True, timeout=100)
    assert not ours(api, ended.stdout.strip())


def test_prune_removes_what_nobody_owns(api: Any, repl: REPLProtocol) -> None:
    dead = own_name().split(".")[0] + ".4194303.1"
    elsewhere = "00000000-0000-0000-0000-000000000000.1.1"
    now = int(time.time())
    made = {}
    for name, owner, expiry in (("dead", dead, now + 999), ("expired", elsewhere, now - 1), ("elsewhere", elsewhere, now + 999)):
        labels = {"org.rlm-sandbox.owner": owner, "org.rlm-sandbox.expiry": str(expiry)}
        made[name] = api.create_container(DockerOptions().image, labels=labels)["Id"]
    try:
        pruned = CliRunner().invoke(cli.app, ["docker", "prune"])
        assert pruned.exit_code == 0
        assert pruned.stdout.count("removed ") >= 2  # and what other processes may have left
        left = {item["Id"] for item in api.containers(all=True)}
        assert made["elsewhere"] in left
        assert made["dead"] not in left
        assert made["expired"] not in left
        assert repl.exec("1").value == "1"
    finally:
        api.remove_container(made["elsewhere"], force=True)


# ---- kill levels, each sufficient when the one before it is defeated


def test_a_container_that_is_killed_is_replaced(api: Any, repl: REPLProtocol) -> None:
    repl.bind("f", lambda: 7)
    assert repl.exec("x = 1").outcome == "ok"
    (container,) = ours(api, own_name())
    api.kill(container["Id"])
    result = repl.exec("f()")
    assert result.state == "lost"
    assert result.lost_names == ("x",)
    after = repl.exec("f()")
    assert after.value == "7"


def test_a_frozen_container_is_killed_from_outside(api: Any) -> None:
    """Neither the soft interrupt nor the supervisor's kill can reach a container that the engine has paused."""
    with open_repl("docker", limits=Limits(time_seconds=1.0)) as repl:
        repl.exec("x = 1")
        (container,) = ours(api, own_name())
        frozen = threading.Timer(0.3, lambda: api.pause(container["Id"]))
        frozen.start()
        start = time.monotonic()
        result = repl.exec("while True: pass")
        took = time.monotonic() - start
        assert result.outcome == "limit"
        assert result.limit is not None
        assert result.limit.kind == "time_seconds"
        assert result.state == "lost"
        assert repl.exec("2").value == "2"
        assert took < 30
        until(lambda: container["Id"] not in {item["Id"] for item in ours(api, own_name())})


@pytest.mark.parametrize("channel", ["auto", "attached"])
def test_a_killed_supervisor_costs_the_state_and_not_the_session(api: Any, channel: Any) -> None:
    with open_repl("docker", options=DockerOptions(channel=channel)) as repl:
        repl.exec("x = 1")
        (container,) = ours(api, own_name())
        pid = api.inspect_container(container["Id"])["State"]["Pid"]
        threading.Timer(0.3, lambda: os.kill(pid, signal.SIGKILL)).start()
        result = repl.exec("import time\ntime.sleep(5)")
        assert (result.outcome, result.state) == ("crashed", "lost")
        assert repl.exec("3").value == "3"


# ---- contexts


def test_a_context_by_a_socket_is_the_hosts_own_memory(api: Any) -> None:
    """No file is written, and nothing appears in the container: its memory file comes by a descriptor."""
    context = Context.from_text("abc" * 100_000)
    with open_repl("docker") as first, open_repl("docker") as second:
        for repl in (first, second):
            repl.bind("ctx", context)
            assert repl.exec("ctx.len_chars()").value == "300000"
            assert repl.exec("import os\nos.listdir('/ctx')").value == "[]"
        assert context not in contexts._files
        # Nobody who keeps the descriptor can open it again to write times, or to lock it.
        assert os.fstat(context.memory_file().fd).st_mode & 0o777 == 0o444
        assert first.exec("import os\nos._exit(1)").state == "restored"
        assert first.exec("ctx.find('abc')[0]").value == "(0, 3, 'abc')"


@pytest.mark.parametrize("options", [DockerOptions(), DockerOptions(channel="attached")], ids=["auto", "attached"])
def test_a_context_is_mapped_and_not_copied(api: Any, options: DockerOptions) -> None:
    """Where the worker cannot map it, it decodes a copy, which works as well and costs the memory."""
    context = Context.from_text("0123456789" * 10_000_000)
    with open_repl("docker", options=options) as repl:
        repl.bind("P", context.whole)
        assert repl.exec("len(P), P[-1]").value == "(100000000, '9')"
        memory = repl.exec("open('/proc/self/statm').read()").value
        assert memory is not None
        resident, shared = (int(field) for field in memory.strip("'").split()[1:3])
        assert (resident - shared) * os.sysconf("SC_PAGE_SIZE") < 50 << 20


def test_a_context_is_one_file_for_all_sessions(api: Any) -> None:
    """On the attached stream, which carries no descriptors."""
    context = Context.from_text("abc" * 100_000)
    attached = DockerOptions(channel="attached")
    with open_repl("docker", options=attached) as first, open_repl("docker", options=attached) as second:
        for repl in (first, second):
            repl.bind("ctx", context)
            assert repl.exec("ctx.len_chars()").value == "300000"
        path = contexts.stored_file(context)
        assert path.stat().st_nlink == 3
        assert path.stat().st_mode & 0o777 == 0o444
        assert path.parent.stat().st_mode & 0o777 == 0o700
        # A cell that is killed gets its text back without another copy.
        assert first.exec("import os\nos._exit(1)").state == "restored"
        assert first.exec("ctx.find('abc')[0]").value == "(0, 3, 'abc')"
    assert path.stat().st_nlink == 1
    del context, first, second, repl
    gc.collect()
    assert not path.exists()


# ---- errors with remedies


def _refused(options: DockerOptions) -> BackendUnavailable:
    with pytest.raises(BackendUnavailable) as caught:
        open_repl("docker", options=options)
    return caught.value


def test_no_engine(api: Any, tmp_path: Path) -> None:
    error = _refused(DockerOptions(docker_host=f"unix://{tmp_path}/none.sock"))
    assert "does not answer" in error.reason
    assert "start Docker" in error.remedy


def test_no_image(api: Any) -> None:
    error = _refused(DockerOptions(image="rlm-sandbox-no-such-image:1"))
    assert "no image rlm-sandbox-no-such-image:1" in error.reason
    assert error.remedy == "build it: make image"
    assert _refused(DockerOptions(image="rlm-sandbox-no-such-image:1-data")).remedy == "build it: make image VARIANT=data"


def test_an_unknown_runtime(api: Any) -> None:
    error = _refused(DockerOptions(runtime="no-such-runtime"))
    assert "no-such-runtime" in error.reason
    assert "runc" in error.reason
    assert "daemon.json" in error.remedy
