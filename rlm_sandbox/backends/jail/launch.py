"""The host's side of launcher and zygote: one pair per host process, started with the first session.

The zygote is shared by all sessions of this process. If it dies, the next session starts another.
"""

from __future__ import annotations

import atexit
import errno
import functools
import os
import platform
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ... import bundle
from ...errors import BackendUnavailable, InputRefused
from ...waiting import is_readable
from ...wire import control
from .library import guest_library

if TYPE_CHECKING:
    from .packages import PackageSet

__all__ = ("Zygote", "shared_zygote")

#: From exec to a warm interpreter; 60 to 90 ms when idle.
_START_SECONDS: Final = 30.0
_SPAWN_SECONDS: Final = 10.0
#: Interpreters that wait without a session, for owners and sets of packages that were here last.
_MOST_IDLE: Final = 8
_MIN_KERNEL: Final = (5, 14)
_NAME: Final = "jail"


def _check_platform() -> None:
    if sys.platform != "linux":
        raise BackendUnavailable(_NAME, "it needs Linux", "use another backend on this system")
    if platform.machine() != "x86_64":
        raise BackendUnavailable(
            _NAME, f"its system-call filter knows x86_64 only, not {platform.machine()}", "use another backend"
        )
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    if found and (int(found[1]), int(found[2])) < _MIN_KERNEL:
        raise BackendUnavailable(
            _NAME, f"Linux {platform.release()} is older than 5.14", "update the kernel or use another backend"
        )


def _remedy(error: str, number: int) -> str:
    if number == 28:  # ENOSPC: user.max_user_namespaces
        return "run: sysctl user.max_user_namespaces=10000"
    if "root" in error:
        return "run as an ordinary user, or as root of a user namespace that maps all ids"
    if "unshare" in error or number in (1, 13):
        return (
            "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, or on Ubuntu "
            "kernel.apparmor_restrict_unprivileged_userns=0; in a container, its seccomp profile must allow unshare and mount)"
        )
    return "run: rlm-sandbox doctor"


def _short_of_descriptors(exc: OSError) -> BackendUnavailable:
    return BackendUnavailable(
        _NAME, f"this process cannot open a channel ({exc.strerror})", "close sessions, or raise the limit: ulimit -n"
    )


@functools.cache
def _library() -> Path:
    """The guest's Python. Looked at once for a process, whose own Python does not change either."""
    return guest_library()


class Zygote:
    """A running launcher and zygote. Thread-safe."""

    def __init__(self, packages: PackageSet | None = None) -> None:
        """
        Args:
            packages: what its sessions can import beside the standard library.

        Raises:
            BackendUnavailable: the kernel does not allow what it needs.
            InputRefused: a package cannot be imported.
        """
        _check_platform()
        self._packages = packages
        self._library = _library()
        self.sessions = 0
        self._importing = ""
        self._lock = threading.Lock()
        self._count_lock = threading.Lock()  # not the other: a session may end while another one starts
        self.owner_pid = os.getpid()
        self._spawns = 0
        try:
            self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as exc:
            raise _short_of_descriptors(exc) from exc
        try:
            archive_fd = os.memfd_create("rlm-guest", os.MFD_CLOEXEC)
        except OSError as exc:
            self._sock.close()
            theirs.close()
            raise _short_of_descriptors(exc) from exc
        try:
            os.write(archive_fd, bundle.guest_archive())
            command = [
                os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", f"/proc/self/fd/{archive_fd}", "launcher",
                str(theirs.fileno()), str(os.getpid()), str(archive_fd),
            ]  # fmt: skip
            self._process = subprocess.Popen(
                command,
                # A Python that needs this to find its library needs it once: the launcher is no guest, and passes nothing on.
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(), archive_fd),
                start_new_session=True,
            )
        except OSError as exc:
            self._sock.close()
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                raise _short_of_descriptors(exc) from exc
            raise BackendUnavailable(
                _NAME, f"this interpreter cannot be started ({exc.strerror})", "use an interpreter that this user may execute"
            ) from exc
        finally:
            os.close(archive_fd)
            theirs.close()
        try:
            self._handshake()
        except BaseException:
            self.close()
            raise

    def _handshake(self) -> None:
        self._sock.settimeout(_START_SECONDS)
        packages = self._packages
        directory = None if packages is None else str(packages.directory)
        self._send({"op": "build", "library": str(self._library), "packages": directory})
        prepare = {"op": "prepare", "imports": [] if packages is None else list(packages.imports)}
        while True:
            message = self._receive()
            if message["op"] == "importing":
                self._importing = str(message["package"])
            elif message["op"] == "import_failed":
                raise self._import_refused(f"it cannot be imported ({message['error']})")
            elif message["op"] == "maps":
                self._write_maps(int(message["uid"]), int(message["gid"]), int(message["count"]))
                self._send({"op": "mapped"})
                self._send(prepare)  # for the zygote, which reads from the same socket when the launcher no longer does
            elif message["op"] == "ready" and message.get("python") != list(sys.version_info[:3]):
                version = ".".join(map(str, message.get("python") or ["?"]))
                raise BackendUnavailable(
                    _NAME,
                    f"its interpreter turned out to be Python {version}, not this one's {platform.python_version()}",
                    "use an interpreter that finds its own library without LD_LIBRARY_PATH",
                )
            elif message["op"] == "ready":
                self._importing = ""
                return
            else:
                self._refuse(message)

    def _write_maps(self, uid: int, gid: int, count: int) -> None:
        """Id maps of the launcher's user namespace, which it has not the right to write itself any more."""
        directory = Path(f"/proc/{self._process.pid}")
        try:
            if count == 1:
                (directory / "setgroups").write_text("deny")
            (directory / "uid_map").write_text(f"0 {uid} {count}")
            (directory / "gid_map").write_text(f"0 {gid} {count}")
        except OSError as exc:
            raise BackendUnavailable(
                _NAME, f"the id maps of its user namespace cannot be written ({exc.strerror})", _remedy("unshare", exc.errno or 0)
            ) from exc

    def _send(self, message: control.Message) -> None:
        try:
            control.send(self._sock, message)
        except OSError:
            pass  # it has ended, and what it said before that is to be read
        except ValueError as exc:
            raise BackendUnavailable(_NAME, "the path of its cache is too long", "set RLM_SANDBOX_CACHE to a shorter one") from exc

    def _import_refused(self, reason: str) -> InputRefused:
        return InputRefused(self._importing, reason, "see that it can be imported on its own, or leave it out")

    def _receive(self) -> control.Message:
        try:
            if not is_readable(self._sock.fileno(), self._sock.gettimeout() or 0.0):
                raise TimeoutError
            got = control.receive(self._sock)
        except TimeoutError:
            if self._importing:
                raise self._import_refused("its import does not come to an end") from None
            raise BackendUnavailable(_NAME, "its zygote did not start in time", "run: rlm-sandbox doctor") from None
        except (OSError, ValueError) as exc:
            raise BackendUnavailable(_NAME, f"its zygote failed ({exc})", "run: rlm-sandbox doctor") from exc
        if got is None and self._importing:
            raise self._import_refused("its import ended the interpreter")
        if got is None:
            raise BackendUnavailable(_NAME, f"its zygote ended at the start{self._last_words()}", "run: rlm-sandbox doctor")
        for fd in got[1]:
            os.close(fd)
        return got[0]

    def _last_words(self) -> str:
        """The last line the launcher wrote, for an error on the host."""
        pipe = self._process.stderr
        if pipe is None:
            return ""
        if not is_readable(pipe.fileno(), 0.5):
            return ""
        lines = os.read(pipe.fileno(), 16_384).decode("utf-8", "replace").strip().splitlines()
        return f" ({lines[-1][:300]})" if lines else ""

    def _refuse(self, message: control.Message) -> None:
        error = str(message.get("error", message["op"]))
        raise BackendUnavailable(_NAME, f"the kernel refused its isolation ({error})", _remedy(error, int(message.get("errno", 0))))

    @property
    def alive(self) -> bool:
        """Whether launcher and zygote still run and belong to this process. A zygote's end is seen here before its sessions'."""
        if self.owner_pid != os.getpid() or self._process.poll() is not None:
            return False
        poll = select.poll()
        poll.register(self._sock, 0)  # the end of the other side is always told
        return not poll.poll(0)

    def spawn(self, settings: dict[str, Any], fds: tuple[int, ...]) -> None:
        """Have the zygote fork a supervisor. ``fds``: worker's data channel, supervisor's control socket, stdout, stderr, and
        a mount for each input.

        Raises:
            BackendUnavailable: it could not.
        """
        with self._lock:
            self._sock.settimeout(_SPAWN_SECONDS)
            try:
                self._spawns += 1
                control.send(self._sock, {"op": "spawn", "number": self._spawns, **settings}, fds)
            except OSError as exc:
                raise BackendUnavailable(_NAME, f"its zygote is gone ({exc.strerror})", "open the session again") from exc
            message = self._receive()
            while message.get("number") != self._spawns:  # the answer to one that was given up (a time-out, Ctrl-C)
                message = self._receive()
        if message["op"] != "spawned":
            self._refuse(message)

    def count(self, change: int) -> None:
        """A session of it has opened (1) or ended (-1)."""
        with self._count_lock:
            self.sessions += change

    def close(self) -> None:
        """End the zygote and every session of it."""
        self._sock.close()
        if self.owner_pid != os.getpid():
            return  # a forked child of the host: the zygote is the parent's
        try:
            self._process.send_signal(signal.SIGKILL)
        except OSError:
            pass
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._process.wait()


#: Whose sessions, and with which packages.
Key = tuple[str, tuple[str, ...]]

_shared: dict[Key, Zygote] = {}
_shared_lock = threading.Lock()


def shared_zygote(packages: tuple[str, ...] = (), owner: str = "") -> Zygote:
    """This process's zygote for an owner's sessions with these packages, started if there is none that lives.

    Raises:
        BackendUnavailable: it cannot be started here.
        InputRefused: a package is not there, or cannot be imported.
    """
    names = tuple(sorted(set(packages)))
    with _shared_lock:
        found = _shared.pop((owner, names), None)
        if found is not None and not found.alive:
            found.close()
            found = None
        if found is None:
            _end_idle()
            if not _shared:
                atexit.register(_close_all)
            found = Zygote(_package_set(names) if names else None)
        _shared[owner, names] = found  # at the end: the order is that of their last use
        return found


def _end_idle() -> None:
    """Owners come and go; an interpreter without sessions is kept only for the latest of them."""
    idle = [key for key, zygote in _shared.items() if zygote.sessions == 0]
    for key in idle[: max(0, len(idle) - _MOST_IDLE)]:
        _shared.pop(key).close()


def _package_set(names: tuple[str, ...]) -> PackageSet:
    from .packages import package_set  # here: a session without packages needs none of what reads their records

    return package_set(names)


def _close_all() -> None:
    while _shared:
        _shared.popitem()[1].close()


def _after_fork() -> None:
    """In a forked child of the host the lock may be held by a thread that does not exist there."""
    global _shared_lock
    _shared_lock = threading.Lock()
    _library.cache_clear()  # a copy without a cache goes with the parent
    _close_all()


os.register_at_fork(after_in_child=_after_fork)
