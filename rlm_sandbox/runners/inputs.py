"""Makes mounts of input files: a process of its own for a moment, because it takes the right to mount.

The host asks for one path after another and gets a descriptor for each: a detached mount, read-only, without devices and
without execution, of the file or directory that the path named at that moment. What came of the path is judged by what was
mounted, so there is nothing to exchange in between.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Final

from ..confine import _syscalls_unsafe as raw
from ..wire import control
from .launcher import is_real_root

__all__ = ("main",)

#: File systems that show the kernel and not files.
_OF_THE_KERNEL: Final = ("/proc", "/sys", "/sys/fs/cgroup", "/dev/pts", "/dev/mqueue")
_KINDS: Final = {
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link",
}  # fmt: skip


class _Refused(Exception):
    """What the path names may not be given to a guest."""


def _mount(path: str, forbidden: set[int]) -> tuple[int, bool]:
    """A detached mount, and whether it is a directory's."""
    mount = raw.detached_mount(path)
    try:
        found = os.fstat(mount)
        kind = stat.S_IFMT(found.st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise _Refused(f"it is {_KINDS.get(kind, 'no file')}")
        if found.st_dev in forbidden:
            raise _Refused("it is the kernel's, not a file")
    except BaseException:
        os.close(mount)
        raise
    return mount, kind == stat.S_IFDIR


def main(control_fd: int) -> int:
    """Serve requests until the host has enough."""
    host = socket.socket(fileno=control_fd)
    forbidden = {os.stat(path).st_dev for path in _OF_THE_KERNEL if os.path.ismount(path)}
    try:
        raw.unshare(raw.CLONE_NEWNS if is_real_root() else raw.CLONE_NEWNS | raw.CLONE_NEWUSER)
        raw.mount("none", "/", "", raw.MS_REC | raw.MS_PRIVATE)  # what is mounted on the host later stays there
    except OSError as exc:
        control.send(host, {"op": "failed", "error": f"{exc.strerror}", "errno": exc.errno})
        return 1
    while (request := control.receive(host)) is not None:
        try:
            mount, directory = _mount(request[0]["path"], forbidden)
        except _Refused as exc:
            control.send(host, {"op": "refused", "error": str(exc), "errno": 0})
        except OSError as exc:
            control.send(host, {"op": "refused", "error": os.strerror(exc.errno or 0), "errno": exc.errno})
        else:
            control.send(host, {"op": "mounted", "directory": directory}, (mount,))
            os.close(mount)
    return 0
