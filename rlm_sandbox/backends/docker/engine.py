"""The Docker engine: one client per address, its errors in our words, and what is left behind on it."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import docker
import docker.errors
import docker.utils
import requests.exceptions

from ... import bundle
from ...errors import BackendUnavailable
from ...options import DockerOptions
from .tunnel import Tunnel

__all__ = (
    "EXPIRY_LABEL",
    "GUEST_LABEL",
    "OWNER_LABEL",
    "RUN_LABEL",
    "Engine",
    "engine_for",
    "mapped_errors",
    "owner_is_alive",
    "own_name",
)

NAME: Final = "docker"
OWNER_LABEL: Final = "org.rlm-sandbox.owner"
RUN_LABEL: Final = "org.rlm-sandbox.run"
EXPIRY_LABEL: Final = "org.rlm-sandbox.expiry"
GUEST_LABEL: Final = "org.rlm-sandbox.guest"
_TIMEOUT_SECONDS: Final = 30
#: A container's stream may end this long before the engine has noted why.
_EVENT_SECONDS: Final = 0.5
#: How long the end of the process waits for what other threads are opening.
_END_SECONDS: Final = 10.0
_BEING_REMOVED: Final = 409
_REMOVAL_SECONDS: Final = 5
_NO_ENGINE: Final = "start Docker, or give its address: DockerOptions(docker_host=...) or DOCKER_HOST"


def _build(image: str, what: str = "build it") -> str:
    """The command that builds an image of ours."""
    return f"{what}: make image VARIANT=data" if image.endswith("-data") else f"{what}: make image"


def _start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot: with its pid, a name no other process of this boot has."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@functools.cache
def _boot() -> str:
    """This boot and pid namespace: in another one, pids of the same machine say nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return "unknown"


def own_name() -> str:
    """This process, as owner of containers and directories: boot and pid namespace, pid, start time."""
    try:
        return f"{_boot()}.{os.getpid()}.{_start_time(os.getpid())}"
    except OSError:
        return f"{_boot()}.{os.getpid()}.0"


def owner_is_alive(owner: str) -> bool | None:
    """Whether the owner runs; None if that cannot be told from here: it belongs to another machine or pid namespace."""
    boot, _, rest = owner.partition(".")
    pid, _, started = rest.partition(".")
    if not pid.isdigit() or boot == "unknown" or boot != _boot():
        return None
    try:
        return _start_time(int(pid)) == started
    except OSError:
        return False


@contextmanager
def mapped_errors(what: str) -> Iterator[None]:
    """Turn the engine's errors into `BackendUnavailable`."""
    try:
        yield
    except docker.errors.APIError as exc:
        text = str(exc.explanation or exc)[:300]
        remedy = _build("") if isinstance(exc, docker.errors.ImageNotFound) else "see the engine's log; run: rlm-sandbox doctor"
        raise BackendUnavailable(NAME, f"{what} failed ({text})", remedy) from exc
    except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as exc:
        raise BackendUnavailable(NAME, f"{what} failed: the engine does not answer ({type(exc).__name__})", _NO_ENGINE) from exc


def _knock(path: str) -> None:
    """The library leaves its socket open when one that a dead engine left behind refuses; so this asks first."""
    try:
        with socket.socket(socket.AF_UNIX) as knocking:
            knocking.settimeout(_TIMEOUT_SECONDS)
            knocking.connect(path)
    except FileNotFoundError:
        raise BackendUnavailable(NAME, "the engine does not answer (there is no such socket)", _NO_ENGINE) from None
    except OSError as exc:
        raise BackendUnavailable(NAME, f"the engine does not answer ({exc.strerror or exc})", _NO_ENGINE) from None


class Engine:
    """One engine's API. Thread-safe as far as sessions need it."""

    def __init__(self, docker_host: str | None) -> None:
        """Raises `BackendUnavailable` if no engine answers."""
        self.owner_pid = os.getpid()
        address = docker_host or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        self.local = address.startswith("unix://")
        self.shares_sockets = self.local
        """Whether its containers can connect to a socket of this process, as far as is known."""
        if self.local:
            _knock(address.removeprefix("unix://"))
        self._tunnel = Tunnel(address) if address.startswith("ssh://") else None
        if self._tunnel is not None:
            address = self._tunnel.address
        with mapped_errors("asking for the engine's version"):
            # With DOCKER_TLS_VERIFY and DOCKER_CERT_PATH as the docker client has them.
            found = docker.utils.kwargs_from_env(environment={**os.environ, "DOCKER_HOST": address})
            self._api: Any = docker.APIClient(version="auto", timeout=_TIMEOUT_SECONDS, **found)
        self._opening = 0
        self._ending = False
        self._opened = threading.Condition()
        atexit.register(self._end)  # before the tunnel's, which was registered earlier

    @property
    def api(self) -> Any:
        """The library's client. Raises ConnectionError if the tunnel has ended: the library would leave a socket open then."""
        if self._tunnel is not None and not self._tunnel.is_open():
            raise ConnectionError("the connection by ssh has ended")
        return self._api

    @contextmanager
    def opening(self) -> Iterator[None]:
        """While a session is opened, which the end of this process waits for.

        Raises:
            BackendUnavailable: this process is ending already.
        """
        with self._opened:
            if self._ending:
                raise BackendUnavailable(NAME, "this process is ending", "open sessions before it does")
            self._opening += 1
        try:
            yield
        finally:
            with self._opened:
                self._opening -= 1
                self._opened.notify_all()

    def _end(self) -> None:
        """At the end of the process: leave nothing of it on the engine. A pool's thread may be opening a session just now."""
        if self.is_cut_off():
            return
        with self._opened:
            self._ending = True
            self._opened.wait_for(lambda: not self._opening, _END_SECONDS)
        try:
            self.prune(ending=own_name())
        except BackendUnavailable:
            pass  # the engine is gone; what it still has when it is back is for the next sweep

    def is_cut_off(self) -> bool:
        """Whether this client will never reach its engine again: it was another process's, or its tunnel has ended."""
        return self.owner_pid != os.getpid() or (self._tunnel is not None and not self._tunnel.is_open())

    def check(self, options: DockerOptions) -> None:
        """Whether sessions can be made with these options. Raises `BackendUnavailable` with the remedy."""
        try:
            with mapped_errors(f"looking for the image {options.image}"):
                found = self.api.inspect_image(options.image)
        except BackendUnavailable as exc:
            if isinstance(exc.__cause__, docker.errors.ImageNotFound):
                raise BackendUnavailable(NAME, f"the engine has no image {options.image}", _build(options.image)) from None
            raise
        labels = found.get("Config", {}).get("Labels") or {}
        if labels.get(GUEST_LABEL) != bundle.digest():
            reason = f"the image {options.image} was built from another version of this package"
            raise BackendUnavailable(NAME, reason, _build(options.image, "build it again"))
        if options.runtime is not None:
            with mapped_errors("asking for the engine's runtimes"):
                runtimes = self.api.info().get("Runtimes") or {}
            if options.runtime not in runtimes:
                known = ", ".join(sorted(runtimes)) or "none"
                raise BackendUnavailable(
                    NAME,
                    f"the engine has no runtime {options.runtime!r} (it has: {known})",
                    "install it and name it in the engine's daemon.json",
                )

    def prune(self, ending: str = "") -> list[str]:
        """Remove containers and volumes that nobody owns any more. Returns their names.

        A container of another machine counts as nobody's after its expiry only. ``ending``: an owner that is about to end.

        Raises:
            BackendUnavailable: the engine does not answer.
        """
        removed = []
        with mapped_errors("listing containers"):
            listed = self.api.containers(all=True, filters={"label": OWNER_LABEL})
        for item in listed:
            labels = item.get("Labels") or {}
            owner = str(labels.get(OWNER_LABEL, ""))
            alive = owner_is_alive(owner) if owner != ending else False
            expiry = str(labels.get(EXPIRY_LABEL, ""))
            expired = alive is None and expiry.isdigit() and int(expiry) < time.time()
            if alive is False or expired:
                self.remove(item["Id"])
                removed.append(str((item.get("Names") or [item["Id"]])[0]).lstrip("/"))
        with mapped_errors("listing volumes"):
            volumes = self.api.volumes(filters={"label": OWNER_LABEL})["Volumes"] or []
        for volume in volumes:
            owner = str((volume.get("Labels") or {}).get(OWNER_LABEL, ""))
            if (owner == ending or owner_is_alive(owner) is False) and self._remove_volume(volume["Name"]):
                removed.append(volume["Name"])
        return removed

    def _remove_volume(self, name: str) -> bool:
        try:
            self.api.remove_volume(name)
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError):
            return False  # a container still uses it
        return True

    def ran_out_of_memory(self, container: str) -> bool:
        """Whether the kernel killed something in this container for its memory limit. Asked of the engine's log of events,
        since a container that has ended is removed at once. Never raises: then it is not known, and False."""
        try:
            now = datetime.fromisoformat(self.api.info()["SystemTime"]).timestamp()  # its clock, which may not be ours
            found = self.api.events(
                since=1,
                until=f"{now + _EVENT_SECONDS:.6f}",
                decode=True,
                filters={"container": [container], "event": ["oom", "die"]},
            )
            try:
                return next((event.get("status") == "oom" for event in found), False)  # it comes before the end
            finally:
                found.close()
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError, KeyError, ValueError):
            return False

    def remove(self, container: str) -> None:
        """Kill and remove a container, if it is still there. Never raises: the sweep finds what is left."""
        try:
            # An engine tells gVisor in vain to kill what is paused, for 10 s, and then leaves it there.
            if self.api.inspect_container(container)["State"].get("Paused"):
                self.api.unpause(container)
            self.api.remove_container(container, force=True, v=True)
        except docker.errors.APIError as exc:
            if exc.status_code == _BEING_REMOVED:  # by the engine, since it has ended; until then its volume is in use
                self._await_removal(container)
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError, KeyError):
            pass  # gone already, or being removed, or the engine is

    def _await_removal(self, container: str) -> None:
        try:
            self.api.wait(container, timeout=_REMOVAL_SECONDS, condition="removed")
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError):
            pass  # it is gone, or takes longer: the sweep finds it


_engines: dict[str | None, Engine] = {}
_lock = threading.Lock()


def engine_for(docker_host: str | None) -> Engine:
    """This process's client of an engine; the first one sweeps what dead processes left on it.

    Raises:
        BackendUnavailable: no engine answers.
    """
    with _lock:
        engine = _engines.get(docker_host)
        if engine is None or engine.is_cut_off():
            engine = _engines[docker_host] = Engine(docker_host)
            engine.prune()
        return engine


def _after_fork() -> None:
    """In a forked child of the host the lock may be held by a thread that does not exist there."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
