"""Every hardening flag of a running session's container, as the engine and the kernel report it, not as it was asked for."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox import Context, Limits, REPLProtocol, open_repl
from rlm_sandbox.backends.docker.engine import own_name
from rlm_sandbox.backends.docker.profile import seccomp_profile
from rlm_sandbox.options import DockerOptions

from .conftest import ours, until

LIMITS = Limits(memory_mb=100, disk_mb=8, processes=20, session_seconds=300)


@pytest.fixture(params=["auto", "attached"])
def channel(request: pytest.FixtureRequest) -> Any:
    """By a socket of this process, where that can be; by the attached stream."""
    return request.param


@pytest.fixture
def found(api: Any, channel: Any) -> Any:
    """What the engine says of a running session's container."""
    with open_repl("docker", limits=LIMITS, options=DockerOptions(cpus=0.5, channel=channel)):
        (container,) = ours(api, own_name())
        yield api.inspect_container(container["Id"])


@pytest.fixture
def repl(api: Any, channel: Any) -> Iterator[REPLProtocol]:
    """A session with the default limits."""
    with open_repl("docker", options=DockerOptions(channel=channel)) as session:
        yield session


def test_the_engine_runs_it_as_asked(found: dict[str, Any], channel: Any) -> None:
    config, host = found["Config"], found["HostConfig"]
    assert config["User"] == "65534:65534"
    assert config["Hostname"] == "sandbox"
    assert not host["Privileged"]
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Devices"]
    assert "no-new-privileges" in host["SecurityOpt"]
    assert f"seccomp={seccomp_profile(sockets=channel == 'auto')}" in host["SecurityOpt"]
    assert host["Memory"] == host["MemorySwap"] == (3 * 100 + 8 + 48) << 20
    assert host["PidsLimit"] == (25 if channel == "auto" else 26)
    assert host["NanoCpus"] == 500_000_000
    assert host["IpcMode"] == "private"
    assert host["LogConfig"]["Type"] == "none"
    assert host["AutoRemove"] is True
    assert set(host["Tmpfs"]) == {"/tmp"}
    assert {"noexec", "nosuid", "nodev", "size=8m"} <= set(host["Tmpfs"]["/tmp"].split(","))
    assert {item["Name"] for item in host["Ulimits"]} >= {"core", "nofile", "fsize", "memlock"}
    assert not any(item["Name"] == "nproc" for item in host["Ulimits"])  # it would count the user over all containers
    assert config["OpenStdin"] is config["StdinOnce"] is True
    assert not config["Tty"]
    assert not host["PortBindings"]
    assert not host["Binds"]
    assert [(mount["Destination"], mount["RW"]) for mount in found["Mounts"]] == [("/ctx", False)]
    assert int(config["Labels"]["org.rlm-sandbox.expiry"]) > 0


def test_no_environment_but_the_engines_path(found: dict[str, Any]) -> None:
    names = {item.partition("=")[0] for item in found["Config"]["Env"] or []}
    assert names <= {"PATH"}


def test_the_kernel_says_so_of_every_process(api: Any, repl: REPLProtocol, channel: Any) -> None:
    assert repl.exec("x = 1").outcome == "ok"
    (container,) = ours(api, own_name())
    pids: list[int] = []

    def settled() -> bool:
        """Supervisor, worker and standby, and the relay on the attached stream; for a moment after a cell there are two standbys."""
        pids[:] = [int(row[0]) for row in api.top(container["Id"], ps_args="-eo pid")["Processes"]]
        return len(pids) == (3 if channel == "auto" else 4)

    until(settled)
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = {line.partition(":")[0]: line.split()[1:] for line in lines}
        assert status["Uid"] == ["65534"] * 4
        assert status["Gid"] == ["65534"] * 4
        assert status["Groups"] == [] or status["Groups"] == ["65534"]
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name][0], 16) == 0
        assert status["NoNewPrivs"] == ["1"]
        assert status["Seccomp"] == ["2"]
        assert int(status["Seccomp_filters"][0]) >= 2  # the engine's and our own inside it
        # Not dumpable: what it has below /proc belongs to root, so that no process of the container can open it.
        assert Path(f"/proc/{pid}/mem").stat().st_uid == 0


_LOOK = """
import ctypes, os, socket
def tried(function, *args):
    try:
        function(*args)
    except Exception as exc:
        return type(exc).__name__
    return "done"
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    return libc.syscall(*args), ctypes.get_errno()
seen = {
    "environment": dict(os.environ), "uid": os.getuid(), "host": os.uname().nodename, "cwd": os.getcwd(),
    "socket": tried(socket.socket), "unix": tried(socket.socket, socket.AF_UNIX),
    "root": tried(open, "/x", "w"), "usr": tried(open, "/usr/lib/rlm_guest/x", "w"), "context": tried(open, "/ctx/x", "w"),
    "tmp": tried(open, "/tmp/x", "w"), "fork": tried(os.fork), "exec": tried(os.execv, "/usr/lib/rlm_python", ["python"]),
    "supervisor memory": tried(open, "/proc/1/mem", "rb"), "supervisor stream": tried(os.listdir, "/proc/1/fd"),
    "kill": tried(os.kill, 1, 9), "sys": tried(open, "/proc/sys/kernel/core_pattern", "w"),
    "connect": call(42, -1, 0, 0), "raw socket": call(41, 1, 5, 0), "contexts": os.listdir("/ctx"),
    "open": sorted(fd for fd in range(64) if tried(os.fstat, fd) == "done"),
}
"""


def test_what_a_cell_finds(repl: REPLProtocol, channel: Any) -> None:
    repl.bind("ctx", Context.from_text("text"))
    result = repl.exec(_LOOK, read=("seen",))
    assert result.outcome == "ok", result.error
    seen = result.read["seen"]
    descriptors = seen.pop("open")
    assert len(descriptors) <= 5, descriptors  # three standard ones, the data channel, and the birth socket
    # The way by which a container connects to its host is gone before a cell runs; a context comes by a descriptor then.
    assert len(seen.pop("contexts")) == (0 if channel == "auto" else 1)
    assert seen == {
        "environment": {},
        "uid": 65534,
        "host": "sandbox",
        "cwd": "/tmp",
        "socket": "PermissionError",
        "unix": "PermissionError",
        "connect": (-1, errno.EPERM),
        "raw socket": (-1, errno.EPERM),
        "root": "OSError",
        "usr": "OSError",
        "context": "FileNotFoundError" if channel == "auto" else "OSError",
        "tmp": "done",
        "fork": "PermissionError",
        "exec": "PermissionError",
        "supervisor memory": "PermissionError",
        "supervisor stream": "PermissionError",
        "kill": "PermissionError",
        "sys": "OSError",
    }


@pytest.mark.parametrize("sockets", [False, True])
def test_the_profile_is_an_allow_list_without_the_dangerous_calls(sockets: bool) -> None:
    profile = json.loads(seccomp_profile(sockets=sockets))
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    if sockets:  # the runner's way to its host, which its own filters close before there is a cell: unix sockets only
        unix = {"index": 0, "value": 1, "valueTwo": 0, "op": "SCMP_CMP_EQ"}
        *_, socket_rule, connect_rule = profile["syscalls"]
        assert socket_rule == {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [unix]}
        assert connect_rule == {"names": ["connect"], "action": "SCMP_ACT_ALLOW"}
        profile["syscalls"] = profile["syscalls"][:-2]
        assert profile == json.loads(seccomp_profile())
    allowed = {name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    forbidden = {
        "socket", "connect", "bind", "mount", "umount2", "pivot_root", "unshare", "setns", "ptrace", "process_vm_readv", "bpf",
        "keyctl", "add_key", "perf_event_open", "userfaultfd", "io_uring_setup", "chroot", "setuid", "init_module", "kexec_load",
        "open_by_handle_at", "mknod", "reboot", "swapon", "shmget", "msgget",
    }  # fmt: skip
    assert not allowed & forbidden
