"""What the registry sees of the jail: probe, capabilities, open."""

from __future__ import annotations

from typing import Final

from ...bridge.copying import CopyingSession
from ...bridge.grades import ALL_HARD
from ...confine import landlock
from ...confine.places import GUEST_INPUT
from ...errors import BackendUnavailable
from ...options import BackendOptions, JailOptions
from ...protocol import Capabilities, Feature, REPLProtocol
from ...registry import Availability, SessionConfig
from .cgroups import check_required, hierarchy, worst_memory_mb
from .guest import JailGuest
from .inputs import check_inputs
from .launch import Zygote, shared_zygote

__all__ = ("BACKEND", "JailBackend")

#: What the host spends on a session outside its group: the supervisor.
_OVERHEAD_MB: Final = 5


#: What every session of the jail has, or it does not start.
_LAYERS: Final = frozenset(
    {
        "user namespaces", "id maps", "mount namespace", "pid namespace", "network namespace", "ipc namespace", "uts namespace",
        "pivot_root", "mount_setattr", "tmpfs quota", "seccomp filter", "seccomp notification", "pidfds", "memory limits", "task limit",
    }
)  # fmt: skip


class JailBackend:
    """See `rlm_sandbox.registry.Backend`."""

    def probe(self, options: BackendOptions | None = None) -> Availability:
        """Start the zygote: that is the mechanism itself, and the first session needs it anyway."""
        try:
            shared_zygote()
            if isinstance(options, JailOptions) and options.cgroup == "require":
                check_required()
        except BackendUnavailable as exc:
            return Availability(False, exc.reason, exc.remedy)
        return Availability(True)

    def capabilities(self, config: SessionConfig) -> Capabilities:
        """What a session enforces."""
        limits = config.limits
        worst = worst_memory_mb(limits, recovery=config.recovery)
        if worst is not None:
            worst += _OVERHEAD_MB
        groups = {f"cgroup {name}" for name in hierarchy().places if name != "cpu" or _chosen(config).cpus is not None}
        return Capabilities(
            backend="jail",
            isolation=(
                "a Linux process without privileges in user, pid, mount, network, ipc and uts namespaces of its own, on a read-only "
                "tree, behind a seccomp allow-list; the host's kernel is shared"
            ),
            **ALL_HARD,
            language=frozenset(Feature),
            soft_interrupt=True,
            recovery="standby" if config.recovery else "none",
            context_route="mapped",
            files=True,
            packages=True,
            fork=True,
            guest_threads=True,
            host_memory_worst_mb=worst,
            layers=_LAYERS | ({"Landlock"} if landlock.abi() else set()) | groups,
            notes=(
                "The REPL is a full CPython with the standard library; there is no network, and no process can be started.",
                "Files can be written below /tmp.",
                *(("Input files: " + ", ".join(f"{GUEST_INPUT}/{name}" for name in config.files) + ".",) if config.files else ()),
                *(("Installed packages: " + ", ".join(config.packages) + ".",) if config.packages else ()),
            ),
        )

    def open(self, config: SessionConfig) -> REPLProtocol:
        """Open a session."""
        check_inputs(config.files)
        return CopyingSession(lambda: _start(config), config, self.capabilities(config))


def _start(config: SessionConfig) -> JailGuest:
    """A guest of this process's zygote. A zygote that died just now is replaced once."""
    zygote = _zygote(config)
    try:
        return JailGuest(zygote, config)
    except BackendUnavailable:
        if zygote.alive:
            raise
    return JailGuest(_zygote(config), config)


def _chosen(config: SessionConfig) -> JailOptions:
    return config.options if isinstance(config.options, JailOptions) else JailOptions()


def _zygote(config: SessionConfig) -> Zygote:
    return shared_zygote(config.packages, _chosen(config).owner)


BACKEND: Final = JailBackend()
