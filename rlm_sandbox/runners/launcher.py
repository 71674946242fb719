"""The launcher: builds the guest's tree and namespaces once, starts the zygote in them, and dies with the host.

It runs with an empty environment, single-threaded, outside every guest. Its only later duty is to watch two
processes: when the host process ends, however it ends, the zygote and with it every session is killed; when the
zygote ends, so does the launcher.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import sys
from typing import Final

from ..confine import _syscalls_unsafe as raw
from ..confine import tree
from ..wire import control

__all__ = ("is_real_root", "main")

#: Kernel ids for guests of a root host. Above what systemd reserves for containers (0x00080000 to 0x6FFFFFFF); a block
#: of 65,536 for each launcher, chosen at random, so that two hosts hardly ever share one.
_FIRST_KERNEL_ID: Final = 0x70000000
_BLOCK: Final = 0x10000
_BLOCKS: Final = 0x0FFF


def is_real_root() -> bool:
    """Root of the initial user namespace, or of one that maps everything: euid 0 alone says nothing."""
    with open("/proc/self/uid_map") as file:
        fields = file.read().split()
    return os.geteuid() == 0 and fields == ["0", "0", "4294967295"]


def _private_namespaces() -> None:
    raw.unshare(raw.CLONE_NEWUSER | raw.CLONE_NEWNS | raw.CLONE_NEWPID | raw.CLONE_NEWIPC | raw.CLONE_NEWUTS | raw.CLONE_NEWNET)
    raw.prctl(raw.PR_SET_DUMPABLE, 1)  # so that the host may write the id maps


def _ask_for_maps(host: socket.socket, uid: int, gid: int, count: int) -> None:
    """Have the host write our id maps: it has the right to, and this process has just given it up."""
    control.send(host, {"op": "maps", "uid": uid, "gid": gid, "count": count})
    answer = control.receive(host)
    if answer is None or answer[0]["op"] != "mapped":
        raise OSError("the host did not write the id maps")


def _enter(host: socket.socket, archive: bytes, wanted: control.Message) -> tuple[dict[str, str], int]:
    """Namespaces and tree. Returns the libraries and how many kernel ids sessions can have (0: the host's own)."""
    library, packages = wanted["library"], wanted["packages"]
    if is_real_root():
        # As root, while paths below 0700 directories are still readable; then become nobody and go on like one.
        raw.unshare(raw.CLONE_NEWNS)
        libraries = tree.build(archive, library, packages)
        base = _FIRST_KERNEL_ID + secrets.randbelow(_BLOCKS) * _BLOCK
        os.setgroups([])
        os.setresgid(base, base, base)
        os.setresuid(base, base, base)
        raw.prctl(raw.PR_SET_DUMPABLE, 1)
        _private_namespaces()
        _ask_for_maps(host, base, base, _BLOCK)
        return libraries, _BLOCK
    uid, gid = os.geteuid(), os.getegid()
    _private_namespaces()
    _ask_for_maps(host, uid, gid, 1)
    return tree.build(archive, library, packages), 0


def _start_zygote(host: socket.socket, proc: int, libraries: dict[str, str], kernel_ids: int) -> int:
    command = tree.guest_command(libraries, "zygote", str(host.fileno()), str(proc), str(kernel_ids))
    pid = os.fork()
    if pid:
        return pid
    try:
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.set_inheritable(host.fileno(), True)
        os.set_inheritable(proc, True)
        os.execve(command[0], command, {})
    finally:
        os._exit(127)


def main(control_fd: int, host_pid: int, archive_fd: int) -> int:
    """Run the launcher. Returns its exit status."""
    host_process = os.pidfd_open(host_pid)
    if os.getppid() != host_pid:
        return 1  # the host died before its pidfd was open; the pid may be somebody else's by now
    host = socket.socket(fileno=control_fd)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    raw.close_all_except({0, 1, 2, control_fd, host_process, archive_fd, proc})
    with open(f"/proc/self/fd/{archive_fd}", "rb") as file:
        archive = file.read()
    os.close(archive_fd)
    order = control.receive(host)
    if order is None or order[0]["op"] != "build":
        return 1
    try:
        libraries, kernel_ids = _enter(host, archive, order[0])
    except OSError as exc:
        control.send(host, {"op": "failed", "error": f"{exc.strerror or exc}"[:1000], "errno": exc.errno or 0})
        return 1
    zygote = os.pidfd_open(_start_zygote(host, proc, libraries, kernel_ids))
    host.close()
    os.close(proc)
    poll = select.poll()
    poll.register(host_process, select.POLLIN)
    poll.register(zygote, select.POLLIN)
    poll.poll()
    try:
        raw.pidfd_send_signal(zygote, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended first
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
