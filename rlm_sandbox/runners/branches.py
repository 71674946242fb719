"""A supervisor of several sessions that were forked from one another, each a `Branch`, and of the states they can go back to.

A copy of a session is its standby, woken as the worker of a new branch; a checkpoint is a standby that is kept. What is
true of a standby is true of them, and nothing that a cell does beforehand may let one branch speak for another:

- A new process gets its birth socket from us, by the kernel (SECCOMP_IOCTL_NOTIF_ADDFD), at the moment it leaves its
  parent's group. So what we send to one process no other can take, whatever descriptors they share.
- The host moves the session that was copied to another process of its own, with new channels and new outputs: whatever a
  cell kept of the old ones is of no use.
- A notification is judged by the branch whose worker leads the caller's process group; guests cannot change that.

Branches share the session's /tmp, its user (so the limit on tasks is their sum) and what pipes or files their cells had open.
"""

from __future__ import annotations

import collections
import fcntl
import os
import resource
import select
import signal
import socket
import struct
from typing import Final, NoReturn

from ..wire import control
from .notifications import read_notification, respond
from .processes import Process
from .supervisor import HELLO, Supervisor, kill, wait

__all__ = ("MAX_BRANCHES", "MAX_KEPT", "Branch")

#: Sessions of one supervisor, and states that each of them keeps.
MAX_BRANCHES: Final = 8
MAX_KEPT: Final = 8
#: The number of the birth socket in every worker, where a new one takes the place of its parent's.
BIRTH_FD: Final = 255
_ADDFD: Final = struct.Struct("=QIIII")
_NOTIF_ADDFD: Final = 0x40182103
_ADDFD_AT: Final = 1


class _Family:
    """The branches of one supervisor."""

    def __init__(self) -> None:
        self.branches: list[Branch] = []
        self.listeners: collections.Counter[int] = collections.Counter()
        self._tasks, self._most_tasks = resource.getrlimit(resource.RLIMIT_NPROC)
        os.dup2(1, BIRTH_FD)  # so that the number is nobody else's here either

    def serve(self) -> None:
        """Until the last branch ends."""
        while self.branches:
            poll = select.poll()
            for branch in self.branches:
                branch.register(poll)
            for listener in self.listeners:
                poll.register(listener, select.POLLIN)
            ready = wait(poll, [until for branch in self.branches for until in branch.deadlines()])
            for branch in list(self.branches):
                try:
                    goes_on = branch.react(ready)
                except ConnectionError:
                    goes_on = False  # its host is gone; the others' is not
                if not goes_on:
                    branch.end()
            for listener in list(self.listeners):
                if listener in ready:
                    self._on_notification(listener)

    def _on_notification(self, listener: int) -> None:
        notification = read_notification(listener)
        if notification is None:
            return
        identity, caller, name, args = notification
        try:
            group = os.getpgid(caller)
        except OSError:
            group = 0
        allowed = any(branch.judges(group) and branch.allows(identity, name, caller, args) for branch in self.branches)
        respond(listener, identity, allowed)

    def processes(self) -> list[Process]:
        """All of them."""
        return [process for branch in self.branches for process in branch.processes()]

    def adjust_tasks(self) -> None:
        """Room for what is there beside one session: a session cannot use it, for its soft limit is moved by us only."""
        if self._tasks == resource.RLIM_INFINITY:
            return
        kept = sum(len(branch.kept) for branch in self.branches)
        soft = min(self._tasks * max(1, len(self.branches)) + kept, self._most_tasks)
        for pid in (0, *(process.pid for process in self.processes())):
            try:
                resource.prlimit(pid, resource.RLIMIT_NPROC, (soft, self._most_tasks))
            except ProcessLookupError:
                pass


class Branch(Supervisor):
    """One session of the supervisor. The first makes the family.

    ``entrances``: descriptors by which the workers that are started for it put themselves into its cgroups.
    """

    def __init__(
        self, host: socket.socket, seconds: float | None, parent: Branch | None = None, entrances: tuple[int, ...] = ()
    ) -> None:
        super().__init__(host, seconds)
        self._entrances = entrances
        self._family: _Family = _Family() if parent is None else parent._family
        self._family.branches.append(self)
        #: Where workers print; our own 1 and 2 for the first ones.
        self._outputs: list[int] = []
        self._outputs_sent = True
        #: Birth sockets of the processes that are not the worker yet, by pid.
        self._births_of: dict[int, socket.socket] = {}
        self.kept: dict[int, Process] = {}
        self._identity = 0

    def serve(self) -> None:
        """See `Supervisor.serve`: for all branches."""
        self._family.serve()

    def processes(self) -> list[Process]:
        """Those of this branch."""
        return [process for process in (self._worker, self._standby, self._newborn, *self.kept.values()) if process]

    def _known_pids(self) -> list[int]:
        return [process.pid for process in self._family.processes()]

    def end(self) -> None:
        """Everything of this branch goes; the others go on."""
        self._bury_worker()
        self._drop_standby()
        for key in list(self.kept):
            self._forget(key)
        self._family.branches.remove(self)
        if self._birth is not None:
            self._birth.close()
        self._close_listener()
        self._close_outputs()
        self._host.close()
        self._reap_orphans()
        self._family.adjust_tasks()

    # ---- workers and their birth sockets

    def _become_worker(self, mine: socket.socket, birth: socket.socket, data_fd: int, generation: int) -> NoReturn:
        for entrance in self._entrances:
            os.write(entrance, b"0")  # before it is confined, and closes them
        os.dup2(birth.detach(), BIRTH_FD, inheritable=False)
        for target, source in zip((1, 2), self._outputs, strict=False):
            os.dup2(source, target)
        super()._become_worker(mine, socket.socket(fileno=BIRTH_FD), data_fd, generation)

    def _take_confined(self, mine: socket.socket) -> None:
        super()._take_confined(mine)
        self._family.listeners[self._listener] += 1

    def _close_listener(self) -> None:
        if self._listener >= 0:
            self._family.listeners[self._listener] -= 1
            if not self._family.listeners[self._listener]:
                del self._family.listeners[self._listener]
                os.close(self._listener)
            self._listener = -1

    def _births(self) -> list[socket.socket]:
        newborn = self._births_of.get(self._newborn.pid) if self._newborn else None
        return super()._births() + ([newborn] if newborn is not None else [])

    def _close_birth(self, process: Process) -> None:
        birth = self._births_of.pop(process.pid, None)
        if birth is not None:
            birth.close()

    def _drop_standby(self) -> None:
        if self._standby:
            self._close_birth(self._standby)
        super()._drop_standby()

    def _drop_newborn(self) -> None:
        if self._newborn:
            self._close_birth(self._newborn)
        super()._drop_newborn()

    def _forget(self, key: int) -> None:
        process = self.kept.pop(key, None)
        if process is not None:
            self._close_birth(process)
            kill(process)

    def _close_outputs(self) -> None:
        for fd in self._outputs:
            os.close(fd)
        self._outputs = []

    def _wake_standby(self, data_fd: int) -> bool:
        assert self._standby is not None
        birth = self._births_of.pop(self._standby.pid)
        fds = [data_fd, *([] if self._outputs_sent else self._outputs)]
        try:
            birth.sendmsg([HELLO], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))])
            self._standby.signal(signal.SIGCONT)  # after it: see `Supervisor._wake_standby`
        except OSError:
            birth.close()
            return False
        if self._birth is not None:
            self._birth.close()
        self._birth, self._outputs_sent = birth, True
        self._worker, self._standby = self._standby, None
        return True

    # ---- the kernel

    def _register_processes(self, poll: select.poll) -> None:
        for process in (self._worker, self._standby):
            if process:
                poll.register(process.fd, select.POLLIN)

    def _hear_kernel(self, ready: set[int]) -> None:
        """The family does: branches share listeners."""

    def judges(self, group: int) -> bool:
        """Whether the process group ``group`` is our worker's."""
        return self._worker is not None and self._worker.pid == group

    def allows(self, identity: int, name: str, caller: int, args: list[int]) -> bool:
        """Whether a system call of our worker's group may go on."""
        self._identity = identity
        return self._allows(name, caller, args)

    def _adopt(self, caller: int) -> bool:
        try:
            process = self._process(caller)
        except OSError:
            return False
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            mine.setblocking(False)
            request = _ADDFD.pack(self._identity, _ADDFD_AT, theirs.fileno(), BIRTH_FD, os.O_CLOEXEC)
            try:  # it fails if the caller is gone: ``process`` may then be another one
                fcntl.ioctl(self._listener, _NOTIF_ADDFD, request)
            except OSError:
                mine.close()
                process.close()
                return False
        self._newborn, self._births_of[caller] = process, mine
        return True

    # ---- orders of the host

    def _obey(self, message: control.Message, fds: list[int]) -> bool:
        op = message["op"]
        if op == "branch":
            self._branch(fds, message["seconds"])
        elif op == "keep":
            self._keep(int(message["key"]))
        elif op == "forget":
            self._forget(int(message["key"]))
            self._family.adjust_tasks()
        elif op == "drop":
            if self._standby:
                self._drop_standby()
                control.send(self._host, {"op": "standby_died"})
        elif op in ("recover", "fresh"):
            self._take_over(message, fds)
        else:
            return super()._obey(message, fds)
        return True

    def _take_over(self, message: control.Message, fds: list[int]) -> None:
        """Recover: from a state that was kept if one is named, with other outputs if there are some."""
        if "key" in message:
            process = self.kept.get(int(message["key"]))
            if process is None or _has_ended(process):
                control.send(self._host, {"op": "gone"})
                return
            self._bury_worker()
            self._drop_standby()
            self._standby = self.kept.pop(int(message["key"]))
        if len(fds) > 1:
            self._close_outputs()
            self._outputs, self._outputs_sent = [os.dup(fd) for fd in fds[1:]], False
        self.recover(fds[0], int(message["generation"]), fresh=message["op"] == "fresh")
        self._outputs_sent = True
        self._family.adjust_tasks()

    def _keep(self, key: int) -> None:
        """The standby is kept as a state to go back to. The next cell needs another one."""
        if self._standby is None or len(self.kept) >= MAX_KEPT:
            control.send(self._host, {"op": "refused"})
            return
        self.kept[key], self._standby = self._standby, None
        self._family.adjust_tasks()
        control.send(self._host, {"op": "kept"})

    def _branch(self, fds: list[int], seconds: float | None) -> None:
        """The standby becomes the worker of a new branch, with a host socket of its own."""
        if self._standby is None or len(self._family.branches) >= MAX_BRANCHES:
            control.send(self._host, {"op": "refused"})
            return
        data_fd, control_fd, *outputs = fds
        copy = Branch(socket.socket(fileno=os.dup(control_fd)), None, self)
        copy._obey({"op": "clock", "seconds": seconds}, [])
        copy._outputs, copy._outputs_sent = [os.dup(fd) for fd in outputs], False
        copy._listener = self._listener
        self._family.listeners[self._listener] += 1
        copy._standby, self._standby = self._standby, None
        copy._births_of[copy._standby.pid] = self._births_of.pop(copy._standby.pid)
        self._family.adjust_tasks()
        if not copy._wake_standby(data_fd):
            copy.end()
            control.send(self._host, {"op": "refused"})
            return
        copy.report_ready()
        control.send(self._host, {"op": "branched"})


def _has_ended(process: Process) -> bool:
    poll = select.poll()
    poll.register(process.fd, select.POLLIN)
    return bool(poll.poll(0))
