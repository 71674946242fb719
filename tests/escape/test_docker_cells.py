"""The attacks of the jail against containers, on the engine's default runtime and on gVisor, judged from outside.

On gVisor a cell that takes the runner apart may cost its own session the state (docs/limitations/docker.md), and that must then be
said. What it may never do there either is reach anything outside, outlive its limit, or go on between turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from rlm_sandbox import BackendUnavailable, Context, DockerOptions, Limits, REPLProtocol, open_repl
from rlm_sandbox.registry import Availability, load_backend

from ..conftest import require_usable
from . import test_jail_cells, test_jail_recovery
from .conftest import SMALL
from .outside import KEPT, SURVIVED, TOOLS, Attack, Listener, everything_said, wait_until, within

WAYS: Final = {
    "default": DockerOptions(),
    "attached": DockerOptions(channel="attached"),
    "gvisor": DockerOptions(runtime="runsc"),
}
#: Recovery by another container, and the time that a loaded machine takes for one on gVisor.
RECOVERY_SECONDS: Final = 6.0
#: Attacks whose whole point is a notifier's decision, or a system call that gVisor does not have: judged by what stays true.
LOOSE_ON_GVISOR: Final = frozenset({"RUN-021", *(attack.id for attack in test_jail_recovery.ATTACKS)})
#: gVisor counts neither a tmpfs's inodes nor, below the engine's limit, a session's threads: memory or time ends these.
LIMITED_ON_GVISOR: Final = frozenset({"PIDS-003", "DISK-002"})


@pytest.fixture(params=WAYS.values(), ids=list(WAYS), scope="module")
def options(request: pytest.FixtureRequest) -> DockerOptions:
    """A runtime that works here, and a way to it."""
    wanted: DockerOptions = request.param
    try:
        state = load_backend("docker").probe(wanted)
    except BackendUnavailable as exc:
        state = Availability(False, exc.reason, exc.remedy)
    require_usable("docker", state)
    return wanted


@pytest.fixture(scope="module")
def runtime(options: DockerOptions) -> str | None:
    """Its name."""
    return options.runtime


class ContainerProcesses:
    """The processes of this process's containers that came since this was made, as the host's kernel lists them by control group."""

    def __init__(self, api: Any, owner: str) -> None:
        self._api = api
        self._owner = owner
        self._containers: set[str] = set()
        self._before = set(self._found())

    def _found(self) -> set[int]:
        mine = self._api.containers(all=True, filters={"label": f"org.rlm-sandbox.owner={self._owner}"})
        self._containers.update(item["Id"] for item in mine)  # one that is gone may have left something
        found = set()
        for path in Path("/proc").glob("[0-9]*/cgroup"):
            try:
                text = path.read_text()
            except OSError:
                continue
            if any(container in text for container in self._containers):
                found.add(int(path.parent.name))
        return found

    def alive(self) -> list[psutil.Process]:
        """Those that run, sleep or are stopped."""
        found = []
        for pid in self._found() - self._before:
            try:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                pass
        return found

    def cpu_seconds(self) -> float:
        """CPU time of all of them."""
        total = 0.0
        for process in self.alive():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def assert_quiet(self, options: DockerOptions) -> None:
        """No more processes than a session has, and none of them uses the CPU between cells."""
        if options.runtime is None:
            most = 3 if options.channel == "auto" else 4  # supervisor, worker, standby; the relay on the attached stream
            wait_until(lambda: len(self.alive()) <= most, f"too many processes: {self.alive()}")
        # gVisor's own threads may have something to tidy up first.
        wait_until(self._is_at_rest, "something of the session runs between cells", 4.0)

    def _is_at_rest(self) -> bool:
        before = self.cpu_seconds()
        time.sleep(0.3)
        return self.cpu_seconds() - before < 0.15


@pytest.fixture
def processes(runtime: str | None) -> Iterator[ContainerProcesses]:
    """The container's processes; none may be left when the test is over."""
    import docker  # here: without it the runtime fixture has its say first

    from rlm_sandbox.backends.docker.engine import own_name

    api = docker.APIClient(version="auto")
    try:
        found = ContainerProcesses(api, own_name())
        yield found
        wait_until(lambda: not found.alive(), f"left behind: {found.alive()}", 10.0)
    finally:
        api.close()


@pytest.fixture
def repl(options: DockerOptions, processes: ContainerProcesses) -> Iterator[REPLProtocol]:
    """A session with small limits."""
    with open_repl("docker", limits=replace(SMALL, time_seconds=10.0), options=options) as session:
        yield session


def _contained(repl: REPLProtocol, attack: Attack, processes: ContainerProcesses, options: DockerOptions) -> str:
    """Run an attack; returns everything the guest said."""
    runtime = options.runtime
    if attack.tools:
        assert repl.exec(TOOLS).ok
    assert repl.exec("x = {'kept': [41]}").ok
    narrow = Limits(time_seconds=1.0) if "limit" in attack.outcomes or attack.id in LOOSE_ON_GVISOR else None
    limit = repl.limits.narrowed(narrow).time_seconds or 0.0
    with within(limit + RECOVERY_SECONDS):
        result = repl.exec(attack.code, limits=narrow)
    with within(limit + RECOVERY_SECONDS):
        following = repl.exec("x['kept'][0] + 1")
    if attack.forges_next and (following.outcome, following.value) != ("ok", "42"):
        following = repl.exec("x['kept'][0] + 1")
    if runtime is not None and attack.id in LOOSE_ON_GVISOR:
        states = {result.state, following.state}
        if (following.outcome, following.value) != ("ok", "42"):
            assert "lost" in states, f"{following.outcome}: {following.error}; {states}"
            assert repl.exec("x = {'kept': [41]}\nx['kept'][0] + 1").value == "42"
    else:
        outcomes, allowed = attack.outcomes, attack.states
        if runtime is not None and attack.id in LIMITED_ON_GVISOR:
            outcomes, allowed = (*outcomes, "limit"), SURVIVED
        assert result.outcome in outcomes, f"{result.outcome}: {result.error}"
        assert result.state in allowed, f"{result.state}, lost {result.lost_names}"
        assert (following.outcome, following.value) == ("ok", "42"), f"{following.outcome}: {following.error}"
    processes.assert_quiet(options)
    return everything_said(result, following)


@pytest.mark.parametrize("attack", test_jail_cells.ATTACKS, ids=lambda attack: attack.id)
def test_a_hostile_cell_costs_only_itself(
    repl: REPLProtocol, processes: ContainerProcesses, options: DockerOptions, attack: Attack
) -> None:
    _contained(repl, attack, processes, options)


@pytest.mark.parametrize("attack", test_jail_recovery.ATTACKS, ids=lambda attack: attack.id)
def test_an_attack_on_recovery_costs_only_itself(
    repl: REPLProtocol, processes: ContainerProcesses, options: DockerOptions, attack: Attack
) -> None:
    assert repl.exec(TOOLS).ok
    _contained(repl, attack, processes, options)


def test_no_file_and_no_environment_of_the_host_is_read(
    repl: REPLProtocol, processes: ContainerProcesses, options: DockerOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = os.urandom(12).hex()
    canary = tmp_path / "canary"
    canary.write_text(token)
    monkeypatch.setenv("CANARY", token)
    paths = [
        str(canary),
        "/etc/shadow",
        "/proc/1/environ",
        "/proc/self/environ",
        "/proc/mounts",
        "/var/run/docker.sock",
        "/.dockerenv",
    ]
    read_all = test_jail_cells._READ_ALL.format(paths=paths)
    said = _contained(repl, Attack("FS-001", "read files of the host", read_all), processes, options)
    assert token not in said
    assert os.uname().nodename not in said


def test_no_listener_of_the_host_is_reached(
    repl: REPLProtocol, processes: ContainerProcesses, options: DockerOptions, listener: Listener
) -> None:
    code = f"""
import socket
made = []
for family in range(1, 46):
    for kind in (1, 2, 3, 5):
        try:
            made.append(socket.socket(family, kind))
        except OSError:
            pass
try:
    socket.create_connection(('127.0.0.1', {listener.port}), 1)
    made.append('reached')
except OSError:
    pass
assert not made
"""
    _contained(repl, Attack("NET-001", "connect to the host", code, ("ok",), KEPT), processes, options)
    listener.assert_unreached()


_FORGE: Final = """
import os, struct, json
HEADER = struct.Struct("<BBHI")
def forged(message):
    raw = json.dumps(message).encode()
    return HEADER.pack(2, 0, 0, len(raw)) + raw
written = 0
for pid in [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]:
    for fd in range(3):
        try:
            opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
            if "host:" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                written += os.write(opened, forged({"op": "recovered", "state": "restored", "worker": 1})) > 0
        except OSError:
            pass
x = 666
os._exit(1)
"""


def test_a_forged_report_of_the_supervisor_is_not_believed(
    repl: REPLProtocol, processes: ContainerProcesses, options: DockerOptions
) -> None:
    """On gVisor a worker can open the relay's stream by /proc: it must not be able to say ``restored`` in its name."""
    assert repl.exec("x = 41").ok
    result = repl.exec(_FORGE)
    following = repl.exec("x if 'x' in globals() else 'gone'")
    assert result.state in ("restored", "lost")
    assert following.value == ("41" if "lost" not in (result.state, following.state) else "'gone'")
    processes.assert_quiet(options)


_SEARCH: Final = """
import os
seen = []
for top in ("/tmp", "/ctx", "/dev", "/proc", "/var", "/run"):
    for folder, folders, files in os.walk(top):
        if top == "/proc" and folder.count("/") > 2:
            folders.clear()
        for name in files:
            seen.append(f"{folder}/{name}")
            if top in ("/tmp", "/ctx") or name in ("cmdline", "environ", "maps", "mountinfo"):
                try:
                    with open(f"{folder}/{name}", "rb") as file:
                        seen.append(file.read(1 << 20).decode("latin-1"))
                except OSError:
                    pass
found = [token in item for item in seen]
len(seen) > 100, sum(found)
"""


def test_a_session_finds_nothing_of_another(repl: REPLProtocol, processes: ContainerProcesses, options: DockerOptions) -> None:
    """Files, contexts, processes and shared memory of a session that runs beside it."""
    token = os.urandom(12).hex()
    repl.set("token", token)
    repl.bind("ctx", Context.from_text(token * 100))
    assert repl.exec("open('/tmp/' + token, 'w').write(token * 100)\nctx.len_chars()").value == "2400"
    assert repl.exec(_SEARCH).value != "(True, 0)"  # the search finds what is there
    with open_repl("docker", limits=replace(SMALL, time_seconds=10.0), options=options) as other:
        other.set("token", token)
        searched = other.exec(_SEARCH)
        assert (searched.outcome, searched.value) == ("ok", "(True, 0)"), searched.error
