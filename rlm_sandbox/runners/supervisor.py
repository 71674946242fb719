"""The supervisor: pid 1 of a session. It never runs cell code; it keeps the worker confined, killable and recoverable.

It believes the kernel (wait status, credentials, notifications) and the host (its control socket), and never the
worker: the worker's word opens no phase and proves nothing. Its duties:

- fork a fresh worker; give it its own process group and take its seccomp notifier;
- answer notifications: no children, no signals to others, except one fork for a standby when the *host* granted a ticket;
- stop the standby, and the worker between turns while a ticket is open;
- on the host's word, kill the worker's group and wake the standby, or fork a fresh worker;
- report the worker's death with what the kernel measured.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, NoReturn

from ..confine import _syscalls_unsafe as raw
from ..confine.steps import InputUnreadable, confine_worker, seal_worker
from ..wire import control
from . import worker
from .notifications import read_notification, respond
from .processes import ByPidfd, Process
from .tasks import allow_tasks

__all__ = ("CANNOT", "HELLO", "LISTENER", "Supervisor", "descriptors", "kill", "main", "wait")

#: A worker whose standby has not said hello by then has been tampered with: it is killed, and the older standby, of
#: the state before the cell that did it, is what is left.
#: Forking 1 GB of small objects takes about 60 ms.
TICKET_SECONDS: Final = 2.0
_START_SECONDS: Final = 5.0
_LAST_WORDS_SECONDS: Final = 1.0
_CREDENTIALS: Final = struct.Struct("=iII")
#: Tasks beyond the limit while a worker forks its standby: the fork, and older standbys that were killed and are not gone yet.
_ROOM: Final = 3
#: Messages a worker may have left on its birth socket before a ticket; more is a flood.
_MAX_STALE: Final = 4096
HELLO: Final = b"H"
CANNOT: Final = b"F"
LISTENER: Final = b"L"


def _interrupt_blocking_call(_number: int, _frame: FrameType | None) -> None:
    """SIGALRM: make a blocking system call return EINTR."""


class Supervisor:
    """The state of one session's supervisor."""

    def __init__(self, host: socket.socket, seconds: float | None) -> None:
        self._host = host
        self._session_until = None if seconds is None else time.monotonic() + seconds
        self._birth: socket.socket | None = None
        self._listener = -1
        self._worker: Process | None = None
        self._death: dict[str, Any] = {}
        self._standby: Process | None = None
        self._newborn: Process | None = None
        self._ticket_until = 0.0
        self._ticket_used = False

    # ---- workers

    def start_worker(self, data_fd: int, generation: int) -> None:
        """Fork a worker that has run nothing yet. Raises OSError if it does not come up."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        pid = os.fork()
        if pid == 0:
            try:
                self._become_worker(mine, theirs, data_fd, generation)
            finally:
                os._exit(1)
        theirs.close()
        self._birth, self._worker = mine, self._process(pid)
        try:
            os.setpgid(pid, pid)
        except OSError:
            pass  # the child did it first
        mine.settimeout(_START_SECONDS)
        self._take_confined(mine)
        mine.setblocking(False)

    def report_ready(self) -> None:
        """Tell the host that the first worker is there, with handles to it and to us, where the kernel has such."""
        assert self._worker is not None
        ready = {"op": "ready", "worker": self._worker.pid}
        control.send(self._host, ready, descriptors(self._process(os.getpid()), self._worker))

    def _process(self, pid: int) -> Process:
        return ByPidfd(pid)

    def _take_confined(self, mine: socket.socket) -> None:
        """A new worker's word that it is confined, with its notifier. Raises OSError if it is not."""
        space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4)
        text, ancillary, _flags, _ = mine.recvmsg(16, space, socket.MSG_CMSG_CLOEXEC)
        rights = [data for level, kind, data in ancillary if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)]
        if text != LISTENER or len(rights) != 1:
            raise OSError(errno.EPROTO, "the worker did not confine itself")
        (self._listener,) = struct.unpack("=i", rights[0])

    def _become_worker(self, mine: socket.socket, birth: socket.socket, data_fd: int, generation: int) -> NoReturn:
        os.setpgid(0, 0)
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        mine.close()
        self._host.close()
        raw.close_all_except({0, 1, 2, birth.fileno(), data_fd})
        self._confine_worker(birth)
        worker.main(data_fd, birth, generation, self._fork)

    _fork: Callable[[socket.socket], int] | None = None
    """How a worker forks its standby, where that is not `os.fork`."""

    def _confine_worker(self, birth: socket.socket) -> None:
        """In the new worker: its last steps before it serves."""
        listener = confine_worker()
        birth.sendmsg([LISTENER], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", listener))])
        os.close(listener)
        seal_worker()

    def _bury_worker(self) -> None:
        """Kill the worker's whole group, and its child that has left the group, and keep what the kernel says of it."""
        self._drop_newborn()
        if not self._worker:
            return
        self._kill_worker(self._worker)
        try:
            _, status, usage = os.wait4(self._worker.pid, 0)
            self._death = {"status": status, "cpu": usage.ru_utime + usage.ru_stime, "maxrss_kb": usage.ru_maxrss}
        except ChildProcessError:  # a copy's worker, and the one that forked it lives: that one is told
            self._death = {}
        self._death["oom"] = self._killed_for_memory()
        self._worker.close()
        self._worker = None
        self._ticket_until = 0.0

    def _killed_for_memory(self) -> bool:
        """Whether the kernel has killed something of this session for its memory since this was last asked."""
        return False

    def _kill_worker(self, process: Process) -> None:
        """Kill a worker and all its children."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _drop_standby(self) -> None:
        if self._standby:
            kill(self._standby)
            self._standby = None

    def _drop_newborn(self) -> None:
        """Kill a child that left the worker's group and did not become the standby: no group sweep would find it."""
        if self._newborn:
            kill(self._newborn)
            self._newborn = None

    def _reap_orphans(self) -> None:
        """Collect zombies that fell to us as pid 1: standbys of workers that are gone."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid in self._known_pids():
                return
            os.waitpid(found.si_pid, 0)

    def _known_pids(self) -> list[int]:
        """Processes whose end is dealt with elsewhere."""
        return [process.pid for process in (self._worker, self._standby) if process]

    # ---- orders of the host

    def recover(self, data_fd: int, generation: int, *, fresh: bool) -> None:
        """End the worker and have another: the standby if there is one and ``fresh`` is false, else an empty one."""
        self._bury_worker()
        if fresh:
            self._drop_standby()
        state = "restored"
        if not self._standby or not self._wake_standby(data_fd):
            state = "fresh"
            self._drop_standby()
            if self._birth is not None:
                self._birth.close()
                self._close_listener()
            self.start_worker(data_fd, generation)
        self._reap_orphans()
        assert self._worker is not None
        message = {"op": "recovered", "generation": generation, "state": state, "worker": self._worker.pid, **self._death}
        control.send(self._host, message, descriptors(self._worker))

    def _close_listener(self) -> None:
        if self._listener >= 0:
            os.close(self._listener)
            self._listener = -1

    def grow_address_space(self, size: int) -> None:
        """Make room for a mapped context. Only the soft limit moves; seccomp keeps the worker from doing it."""
        for process in (self._worker, self._standby):
            if process:
                soft, hard = resource.prlimit(process.pid, resource.RLIMIT_AS)
                if soft != resource.RLIM_INFINITY:
                    resource.prlimit(process.pid, resource.RLIMIT_AS, (soft + size, hard))
        control.send(self._host, {"op": "grown"})

    def _wake_standby(self, data_fd: int) -> bool:
        """Make the standby the worker: it gets the new data channel, and says hello on it to the host."""
        assert self._birth is not None
        assert self._standby is not None
        self._drain_birth()
        try:
            # In this order: a cell may have made the socket, which the standby shares with it, one that does not wait.
            self._birth.sendmsg([HELLO], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", data_fd))])
            self._standby.signal(signal.SIGCONT)
        except OSError:
            return False
        self._worker, self._standby = self._standby, None
        return True

    def open_ticket(self) -> None:
        """The host says the turn is over: for a moment, the worker's main thread may fork once."""
        if not self._worker or not self._drain_birth():
            self._fail_ticket("the worker flooded its supervisor")
            return
        self._ticket_until = time.monotonic() + TICKET_SECONDS
        self._ticket_used = False

    def _drain_birth(self) -> bool:
        """Throw away what the worker wrote before its turn. False if there is no end of it."""
        assert self._birth is not None
        for _ in range(_MAX_STALE):
            try:
                self._birth.recvmsg(16)
            except BlockingIOError:
                return True
            except OSError:
                return False
        return False

    def _end_ticket(self) -> None:
        """There is no standby, and its time is over."""
        self._fail_ticket("no standby within its time")

    def _leave_unprotected(self) -> None:
        """The worker goes on without a standby. The one that there may be is of an older state: it goes."""
        assert self._worker is not None
        self._ticket_until = 0.0
        self._drop_standby()
        self._worker.signal(signal.SIGSTOP)
        control.send(self._host, {"op": "unprotected"})

    def _fail_ticket(self, why: str) -> None:
        """The worker broke the rules of the ticket (it forged the end of its cell, say): kill it. An older standby stays."""
        self._ticket_until = 0.0
        self._bury_worker()
        control.send(self._host, {"op": "died", "why": why, **self._death})

    # ---- events

    def on_birth(self, birth: socket.socket) -> None:
        """A message on a birth socket while a ticket is open."""
        try:
            text, ancillary, _flags, _ = birth.recvmsg(16, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return
        sender = 0
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(data) == _CREDENTIALS.size:
                sender = _CREDENTIALS.unpack(data)[0]
        self._on_birth_word(sender, text)

    def _on_birth_word(self, sender: int, text: bytes) -> None:
        """``text`` of the process ``sender``, as the kernel tells, while a ticket is open."""
        assert self._worker is not None
        if sender == self._worker.pid and text == CANNOT and not self._ticket_used:
            self._leave_unprotected()  # the kernel refused the fork (memory, tasks)
        elif self._newborn and sender == self._newborn.pid and text == HELLO:
            self._accept_standby(self._newborn)

    def _accept_standby(self, newborn: Process) -> None:
        """The newborn, which is in a group of its own, is the standby from now on."""
        assert self._worker is not None
        try:
            newborn.signal(signal.SIGSTOP)
        except ProcessLookupError:  # it has died since it said hello, and the worker has waited for it
            self._fail_ticket("its standby is gone")
            return
        allow_tasks((newborn.pid, self._worker.pid), 0)
        self._drop_standby()
        self._standby, self._newborn = newborn, None
        self._ticket_until = 0.0
        self._worker.signal(signal.SIGSTOP)
        control.send(self._host, {"op": "protected"})

    def on_notification(self) -> None:
        """A system call of a guest waits for our word."""
        notification = read_notification(self._listener)
        if notification is not None:
            identity, caller, name, args = notification
            respond(self._listener, identity, self._allows(name, caller, args))

    def _allows(self, name: str, caller: int, args: list[int]) -> bool:
        worker = self._worker.pid if self._worker else 0
        if name in ("clone", "fork"):
            if not self._ticket_until or self._ticket_used or caller != worker:
                return False
            self._ticket_used = True
            allow_tasks((worker,), _ROOM)
            return True
        if name == "setpgid":
            # Only the new standby, leaving the worker's group so that killing that group spares it. From here on it is known.
            expected = self._ticket_until and self._ticket_used and not self._newborn
            known = (worker, self._standby.pid if self._standby else 0)
            return bool(expected) and caller not in known and args[:2] == [0, 0] and self._adopt(caller)
        if name in ("kill", "tgkill"):
            return args[0] & 0xFFFFFFFF == worker
        return False

    def _adopt(self, caller: int) -> bool:
        """Remember the worker's new child. False for a thread that does not lead its process, and for a thread of the worker."""
        try:
            self._newborn = self._process(caller)
        except OSError:
            return False
        return True

    def serve(self) -> None:
        """Answer host, kernel and worker until the host is gone."""
        while True:
            poll = select.poll()
            self.register(poll)
            if not self.react(wait(poll, self.deadlines())):
                return

    def register(self, poll: select.poll) -> None:
        """Everything that may have something to say."""
        poll.register(self._host, select.POLLIN)
        self._register_processes(poll)
        if self._ticket_until:
            for birth in self._births():
                poll.register(birth, select.POLLIN)

    def deadlines(self) -> list[float]:
        """When we must look although nobody says anything."""
        return [until for until in (self._ticket_until, self._session_until) if until]

    def react(self, ready: set[int]) -> bool:
        """Deal with what is ready. False when the session is over."""
        now = time.monotonic()
        if self._session_until is not None and now >= self._session_until:
            return False
        # The host first: its ticket was sent before it told the worker to fork.
        if self._host.fileno() in ready:
            return self.on_order()
        if self._ticket_until and now >= self._ticket_until:
            self._end_ticket()
            return True
        if self._ticket_until:
            for birth in self._births():
                if birth.fileno() in ready and self._ticket_until:
                    self.on_birth(birth)
        if self._worker and self._worker_ended(self._worker, ready):
            self._bury_worker()
            control.send(self._host, {"op": "died", **self._death})
            return True
        if self._standby and self._standby.fd in ready:
            self._drop_standby()  # the kernel killed it (memory)
            control.send(self._host, {"op": "standby_died"})
        self._hear_kernel(ready)
        return True

    def _births(self) -> list[socket.socket]:
        """Where the worker and its child speak to us while a ticket is open."""
        return [self._birth] if self._birth is not None else []

    def _hear_kernel(self, ready: set[int]) -> None:
        if self._worker and self._listener in ready:
            self.on_notification()

    def _register_processes(self, poll: select.poll) -> None:
        if self._worker:
            poll.register(self._worker.fd, select.POLLIN)
            poll.register(self._listener, select.POLLIN)
        if self._standby:
            poll.register(self._standby.fd, select.POLLIN)

    def _worker_ended(self, process: Process, ready: set[int]) -> bool:
        return process.fd in ready

    def on_order(self) -> bool:
        """One message of the host. False when the session is over."""
        request = control.receive(self._host)
        if request is None:
            return False
        message, fds = request
        try:
            return self._obey(message, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _obey(self, message: control.Message, fds: list[int]) -> bool:
        """Carry out an order. False if there is no such order."""
        if message["op"] == "ticket":
            self.open_ticket()
        elif message["op"] in ("recover", "fresh"):
            self.recover(fds[0], int(message["generation"]), fresh=message["op"] == "fresh")
        elif message["op"] == "grow":
            self.grow_address_space(int(message["bytes"]))
        elif message["op"] == "clock":
            self._session_until = None if message["seconds"] is None else time.monotonic() + float(message["seconds"])
        elif message["op"] == "stopped":
            self.on_stopped()
        else:
            return False
        return True

    def on_stopped(self) -> None:
        """The worker has been stopped between turns."""


def wait(poll: select.poll, deadlines: list[float]) -> set[int]:
    """The descriptors that are ready by the first of the deadlines."""
    left = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
    # At most an hour at once: the poll call takes milliseconds as a C int, which 25 days overflow.
    return {fd for fd, _ in poll.poll(None if left is None else min(left, 3_600.0) * 1000)}


def kill(process: Process) -> None:
    try:
        process.signal(signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.close()


def descriptors(*processes: Process) -> tuple[int, ...]:
    return tuple(process.fd for process in processes if process.fd >= 0)


def main(
    confine: Callable[[], None],
    keep: set[int],
    fds: list[int],
    seconds: float | None,
    make: Callable[[socket.socket, float | None], Supervisor] = Supervisor,
) -> NoReturn:
    """Be the supervisor of one session, for at most ``seconds``.

    ``confine``: this technique's steps; ``keep``: descriptors they need. ``fds``: the worker's data channel, our control
    socket, stdout and stderr pipes. ``make``: the kind of supervisor, by what the kernel offers.
    """
    status = 1
    data_fd, control_fd, out_fd, err_fd = fds
    host = socket.socket(fileno=control_fd)
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for target, source in ((0, null), (1, out_fd), (2, err_fd)):
            os.dup2(source, target, inheritable=True)
        raw.close_all_except({0, 1, 2, data_fd, control_fd, *keep})
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, _interrupt_blocking_call)
        confine()
        supervisor = make(host, seconds)
        supervisor.start_worker(data_fd, 1)
        os.close(data_fd)
        supervisor.report_ready()
    except (OSError, ValueError, OverflowError) as exc:  # setrlimit raises the latter two where the kernel refuses a limit
        text, number = (exc.strerror, exc.errno) if isinstance(exc, OSError) else (None, None)
        failure = {"op": "failed", "error": f"{text or exc}"[:500], "errno": number or 0}
        control.send(host, {**failure, "input": exc.name} if isinstance(exc, InputUnreadable) else failure)
        host.settimeout(_LAST_WORDS_SECONDS)
        try:
            host.recv(1)  # as pid 1 of a container we would take the relay with us before it has passed this on
        except OSError:
            pass
        os._exit(1)
    try:
        supervisor.serve()
        status = 0
    finally:
        os._exit(status)
