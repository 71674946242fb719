"""What a session's container sees of its host: a directory, mounted read-only when the container is created.

By sockets the host's socket is in it, until the container has connected. On the attached stream contexts appear in it: each text
is written to a file once and hard-linked into the directory of a session, so that attaching costs nothing in the size of the text
and the page cache is shared by every container of the engine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Final

from docker.types import Mount

from ...context import Context, DataContext
from ...runners.container import CONTEXTS, HOST_SOCKET
from .engine import own_name, owner_is_alive

__all__ = ("SessionDirectory", "stored_file", "sweep")

_PREFIX: Final = "rlm-sandbox-docker."
_SHM: Final = Path("/dev/shm")  # noqa: S108 - a directory of our own below it, 0700, with a name of our own
_root: Path | None = None
_root_pid = 0
_lock = threading.Lock()
_files: weakref.WeakKeyDictionary[Context | DataContext, Path] = weakref.WeakKeyDictionary()


def _base() -> Path:
    return _SHM if os.access(_SHM, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def sweep() -> None:
    """Remove directories of processes that ended without doing it (killed, say)."""
    for path in _base().glob(f"{_PREFIX}*"):
        try:
            mine = path.lstat().st_uid == os.geteuid() and not path.is_symlink()
        except OSError:
            continue
        if mine and owner_is_alive(path.name.removeprefix(_PREFIX)) is False:
            shutil.rmtree(path, ignore_errors=True)


def _own_root() -> Path:
    """This process's directory, private to its user. Call with the lock held."""
    global _root, _root_pid
    if _root is None or _root_pid != os.getpid():
        sweep()
        path = _base() / f"{_PREFIX}{own_name()}"
        path.mkdir(mode=0o700)
        weakref.finalize(_keeper, _remove_root, path, os.getpid())
        _root, _root_pid = path, os.getpid()
        _files.clear()
    return _root


class _Keeper:
    """Lives as long as the process; the finalizers on it run at exit."""


_keeper: Final = _Keeper()


def _remove_root(path: Path, pid: int) -> None:
    if pid == os.getpid():
        shutil.rmtree(path, ignore_errors=True)


def stored_file(context: Context | DataContext) -> Path:
    """The context's text as a file that containers can map, written on the first call; it goes with the context.

    Raises:
        OSError: there is no room for it.
    """
    with _lock:
        path = _files.get(context)
        if path is not None and path.exists():
            return path
        stored = context.memory_file()
        path = _own_root() / f"text-{secrets.token_hex(8)}"
        size = os.fstat(stored.fd).st_size
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            offset = 0
            while offset < size:
                offset += os.sendfile(fd, stored.fd, offset, size - offset)
            os.fchmod(fd, 0o444)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        _files[context] = path
        weakref.finalize(context, path.unlink, missing_ok=True)
        return path


def _after_fork() -> None:
    """In a forked child of the host the lock may be held by a thread that does not exist there."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class SessionDirectory:
    """What one session's container sees below `CONTEXTS`."""

    def __init__(self) -> None:
        """Raises OSError if there is no place for it."""
        with _lock:
            self.path = _own_root() / f"session-{secrets.token_hex(8)}"
        self._owner = os.getpid()
        self._names: list[str] = []
        self.path.mkdir(mode=0o755)
        self.path.chmod(0o755)

    def link(self, fd: int) -> str:
        """Show the file behind a descriptor, one of `stored_file`'s, to the session. Returns its name there."""
        name = secrets.token_hex(8)
        # With a directory's descriptor Python uses linkat(2), which follows the link in /proc to the file; link(2) does not.
        proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._names.append(name)
            os.link(str(fd), self.path / name, src_dir_fd=proc, follow_symlinks=True)
        finally:
            os.close(proc)
        return name

    def listen(self) -> socket.socket:
        """A socket in it, to which the session's container, or who may enter the directory, can connect. The caller closes it.

        Raises:
            OSError: this process has no descriptors left.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # By a descriptor: the address of a socket has room for 107 bytes of path.
            directory = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._names.append(HOST_SOCKET)
            try:
                listener.bind(f"/proc/self/fd/{directory}/{HOST_SOCKET}")
            finally:
                os.close(directory)
            (self.path / HOST_SOCKET).chmod(0o666)
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
        return listener

    def mount(self) -> Mount:
        """What the session's container gets. As a mount, not a bind: an engine without that directory then refuses it."""
        return Mount(target=CONTEXTS, source=str(self.path), type="bind", read_only=True)

    def open(self, context: Context | DataContext) -> int:
        """A descriptor of the context's file.

        Raises:
            OSError: there is no room for it.
        """
        return os.open(stored_file(context), os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Take it away, for which no descriptor is needed. Idempotent."""
        if self._owner != os.getpid():
            return
        for name in self._names:
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()
