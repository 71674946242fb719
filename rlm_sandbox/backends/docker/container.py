"""What is asked of the engine for one session's container: every flag in one place, checked from outside by a test."""

from __future__ import annotations

import secrets
import time
from typing import Any, Final

from docker.types import LogConfig, Mount, Ulimit

from ...limits import Limits
from ...options import DockerOptions
from .engine import EXPIRY_LABEL, OWNER_LABEL, RUN_LABEL, Engine, mapped_errors, own_name
from .profile import seccomp_profile

__all__ = ("OVERHEAD_MB", "USER_ID", "WAIT_SECONDS", "container_settings", "create_container", "memory_mb")

#: The user inside, which on engines without user-namespace remapping is that of the same number outside.
USER_ID: Final = 65534
#: Copies of a heap at worst: the worker, its standby, and the next standby while it takes the other's place.
_PROCESSES: Final = 3
#: Supervisor, relay and the interpreter's own pages; the base that every container has.
OVERHEAD_MB: Final = 48
#: Beside the worker's own: the supervisor, the standby, and while the next one is forked that one and those before it that were
#: killed and are not gone yet. The engine refuses a fork beyond it: a guest that keeps to its own number always has a standby.
_TASKS: Final = 5
#: A named runtime (gVisor's, say) has threads and memory of its own in the container's groups, and about two threads for
#: each of the guest's. Measured with runsc 20221219: 45 threads and 60 MiB for an idle session.
_RUNTIME_TASKS: Final = 192
_RUNTIME_TASKS_EACH: Final = 2
_RUNTIME_MB: Final = 128
_INODES_PER_MB: Final = 256
_DESCRIPTORS: Final = 1024
#: How long a session may wait in a pool before its own time begins.
WAIT_SECONDS: Final = 3_600
_EXPIRY_SLACK_SECONDS: Final = 600


def memory_mb(limits: Limits, *, recovery: bool, runtime: str | None = None) -> int | None:
    """What the container may use in MiB: worker and standbys can grow apart, and its tmpfs counts too. None: no limit."""
    if limits.memory_mb is None or limits.disk_mb is None:
        return None
    own = OVERHEAD_MB + (_RUNTIME_MB if runtime is not None else 0)
    return limits.memory_mb * (_PROCESSES if recovery else 1) + limits.disk_mb + own


def _tasks(processes: int, runtime: str | None, *, sockets: bool) -> int:
    guests = processes + _TASKS + (0 if sockets else 1)  # the relay
    return guests if runtime is None else guests * _RUNTIME_TASKS_EACH + _RUNTIME_TASKS


def _tmpfs(disk_mb: int | None) -> str:
    base = "nosuid,nodev,noexec,mode=0700,uid=65534,gid=65534"
    if disk_mb is None:
        return base
    if disk_mb == 0:
        return "ro,nosuid,nodev,noexec,size=4k,nr_inodes=2,mode=0555"
    return f"{base},size={disk_mb}m,nr_inodes={disk_mb * _INODES_PER_MB}"


def container_settings(options: DockerOptions, limits: Limits, *, recovery: bool, sockets: bool = False) -> dict[str, Any]:
    """The hardening of a session's container, in the words of docker-py's ``create_host_config``.

    ``sockets``: it is to connect to a socket of the host's instead of speaking on the attached stream.
    """
    memory = memory_mb(limits, recovery=recovery, runtime=options.runtime)
    settings: dict[str, Any] = {
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges", f"seccomp={seccomp_profile(sockets=sockets)}"],
        "tmpfs": {"/tmp": _tmpfs(limits.disk_mb)},  # noqa: S108 - the container's own
        "ulimits": [
            Ulimit(name="core", soft=0, hard=0),
            Ulimit(name="nofile", soft=_DESCRIPTORS, hard=_DESCRIPTORS),
            Ulimit(name="memlock", soft=0, hard=0),
            Ulimit(name="msgqueue", soft=0, hard=0),
        ],
        "ipc_mode": "private",
        "log_config": LogConfig(type=LogConfig.types.NONE),
        "auto_remove": True,
    }
    if memory is not None:
        settings["mem_limit"] = settings["memswap_limit"] = f"{memory}m"
    if limits.processes is not None:
        settings["pids_limit"] = _tasks(limits.processes, options.runtime, sockets=sockets)
    if limits.disk_mb is not None:
        size = max(1, limits.disk_mb) << 20
        settings["ulimits"].append(Ulimit(name="fsize", soft=size, hard=size))
    if options.cpus is not None:
        settings["nano_cpus"] = int(options.cpus * 1e9)
    if options.runtime is not None:
        settings["runtime"] = options.runtime
    return settings


def create_container(
    engine: Engine, options: DockerOptions, limits: Limits, *, recovery: bool, contexts: Mount, sockets: bool
) -> str:
    """Create a session's container, not started. ``contexts``: where its contexts will appear. Returns its id.

    ``sockets``: see `container_settings`.

    Raises:
        BackendUnavailable: the engine refuses, or does not answer.
    """
    settings = container_settings(options, limits, recovery=recovery, sockets=sockets)
    seconds = limits.session_seconds
    run = secrets.token_hex(8)
    name = f"rlm-sandbox-{run}"
    labels = {OWNER_LABEL: own_name(), RUN_LABEL: run}
    if seconds is not None:
        labels[EXPIRY_LABEL] = str(int(time.time() + WAIT_SECONDS + seconds) + _EXPIRY_SLACK_SECONDS)
    with mapped_errors("creating a container"):
        api = engine.api
        try:
            made = api.create_container(
                options.image,
                name=name,
                command=["container", "sockets"] if sockets else ["container"],
                user=f"{USER_ID}:{USER_ID}",
                hostname="sandbox",
                stdin_open=True,  # and once: when this process is gone, so is the container's standard input, and it ends
                environment={},
                labels=labels,
                network_disabled=True,
                healthcheck={"test": ["NONE"]},
                host_config=api.create_host_config(mounts=[contexts], **settings),
            )
        except BaseException as exc:
            if not isinstance(exc, Exception):  # Ctrl-C, say: the engine may have made it, and nobody would know its id
                engine.remove(name)
            raise
    return str(made["Id"])
