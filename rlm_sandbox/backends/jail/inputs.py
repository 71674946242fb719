"""Input files on the host's side: names and paths become detached mounts, made by a process of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ... import bundle
from ...errors import BackendUnavailable, InputRefused
from ...waiting import is_readable
from ...wire import control

__all__ = ("check_inputs", "input_mounts")

_MAX_INPUTS: Final = 32
_MAX_NAME_BYTES: Final = 120
_SECONDS: Final = 20.0
_PYTHON: Final = (os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8")


def check_inputs(files: Mapping[str, Path]) -> None:
    """Refuse names that are no plain file names.

    Raises:
        InputRefused: a name, or their number.
    """
    if len(files) > _MAX_INPUTS:
        raise InputRefused("files", f"there are {len(files)} of them", f"give at most {_MAX_INPUTS}, or one directory")
    for name in files:
        plain = name not in ("", ".", "..") and "/" not in name and name.isprintable()
        if not plain or len(os.fsencode(name)) > _MAX_NAME_BYTES:
            raise InputRefused(name[:200], "that is no plain file name", f"name it without '/', in at most {_MAX_NAME_BYTES} bytes")


@contextmanager
def input_mounts(files: Mapping[str, Path]) -> Iterator[tuple[list[tuple[str, bool]], list[int]]]:
    """The names, each with whether it is a directory, and descriptors of their mounts, which are closed at the end.

    Raises:
        InputRefused: there is nothing there that can be read, or not a file or directory.
        BackendUnavailable: the kernel does not let this user mount.
    """
    found: list[tuple[str, bool]] = []
    mounts: list[int] = []
    try:
        if files:
            with _mounter() as sock:
                for name, path in files.items():
                    message, fds = _mount(sock, name, path)
                    found.append((name, bool(message["directory"])))
                    mounts += fds
        yield found, mounts
    finally:
        for fd in mounts:
            os.close(fd)


@contextmanager
def _mounter() -> Iterator[socket.socket]:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    archive = os.memfd_create("rlm-guest", os.MFD_CLOEXEC)
    try:
        os.write(archive, bundle.guest_archive())
        process = subprocess.Popen(
            [*_PYTHON, f"/proc/self/fd/{archive}", "inputs", str(theirs.fileno())],
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), archive),
        )
    except OSError as exc:
        mine.close()
        raise BackendUnavailable("jail", f"its inputs cannot be mounted ({exc.strerror})", "run: rlm-sandbox doctor") from exc
    finally:
        os.close(archive)
        theirs.close()
    mine.settimeout(_SECONDS)
    try:
        yield mine
    finally:
        mine.close()
        process.kill()
        process.wait()


def _mount(sock: socket.socket, name: str, path: Path) -> tuple[control.Message, list[int]]:
    shown = str(path)
    try:
        control.send(sock, {"op": "mount", "path": os.path.abspath(path)})  # noqa: PTH100 - `resolve` would follow links here
        got = control.receive(sock) if is_readable(sock.fileno(), _SECONDS) else None
    except ValueError:
        raise InputRefused(name, "its path is too long", "give a shorter one") from None
    except OSError as exc:
        raise BackendUnavailable("jail", f"the input {name!r} was not mounted ({exc})", "run: rlm-sandbox doctor") from exc
    if got is None:
        raise BackendUnavailable("jail", f"the input {name!r} was not mounted", "run: rlm-sandbox doctor")
    message, fds = got
    if message["op"] == "mounted" and len(fds) == 1:
        return message, fds
    if message["op"] == "refused":
        error, number = str(message["error"]), message.get("errno")
        remedy = f"give a file or directory that this user may read, not {shown!r}"
        if number == 22:  # EINVAL: something is mounted below it, which a mount of it alone would uncover
            error, remedy = "other file systems are mounted below it", "name the directories below it one by one"
        raise InputRefused(name, error, remedy)
    raise BackendUnavailable("jail", f"inputs cannot be mounted ({message.get('error')})", "run: rlm-sandbox doctor")
