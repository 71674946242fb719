"""A child of the zygote, forked ahead: the next session's supervisor, in namespaces of its own and otherwise nobody's yet.

A fork of an interpreter and a set of namespaces take longer than the rest of a session's start, and are the same for every
session. A spare has them behind it when its session is asked for. It serves one session; no guest has run in it, and what it
has of the session it learns from the order that it waits for.
"""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass
from typing import Final

from ..confine import _syscalls_unsafe as raw
from ..confine import landlock
from ..confine.steps import Input, SessionConfinement, confine_supervisor, enter_namespaces
from ..wire import control
from . import supervisor
from .branches import Branch

__all__ = ("Nursery",)

#: Worker's data, supervisor's control, stdout, stderr; then the mounts of input files, then the entrances of its cgroups.
_CHANNELS: Final = 4


@dataclass(frozen=True, slots=True)
class _Base:
    """What the sessions of a zygote have in common. ``data``, ``address_space``: bytes that the zygote itself uses."""

    data: int
    address_space: int
    landlock: int


def _limit(message: control.Message, name: str) -> int | None:
    value = message[name]
    return None if value is None else int(value)


class Nursery:
    """Where the zygote makes supervisors."""

    def __init__(self, host: socket.socket, proc: int, kernel_ids: int, sizes: tuple[int, int]) -> None:
        """
        Args:
            host: the zygote's control socket, which no child keeps.
            proc: a descriptor of a procfs that shows this process.
            kernel_ids: how many ids sessions can run as, from 1 below this; 0 to keep the zygote's own.
            sizes: bytes of data and of address space that every session starts from.
        """
        self._host = host
        self._proc = proc
        self._kernel_ids = kernel_ids
        self._base = _Base(*sizes, landlock.abi())  # found out once: every session has it, or none
        self._own = os.pidfd_open(os.getpid())
        self._next_id = 1
        self._spare: socket.socket | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no spare waits."""
        return self._spare is None

    def spawn(self, message: control.Message, fds: list[int]) -> None:
        """Have the spare serve a session; one that is made now if none waits or it has died. Raises OSError if it cannot be made."""
        spare, self._spare = self._spare, None
        if spare is not None:
            with spare:
                try:
                    control.send(spare, message, tuple(fds))
                except OSError:
                    pass  # it has died
                else:
                    return
        with self._fork() as fresh:
            control.send(fresh, message, tuple(fds))

    def prepare(self) -> None:
        """Have a spare wait. Raises OSError if the kernel refuses it."""
        self._spare = self._fork()

    def _fork(self) -> socket.socket:
        """A new spare, as pid 1 of a pid namespace of its own, by the socket that it waits at. Raises OSError if the kernel refuses."""
        kernel_id = None
        if self._kernel_ids:
            kernel_id = self._next_id
            self._next_id = self._next_id % (self._kernel_ids - 1) + 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            raw.unshare(raw.CLONE_NEWPID)  # for children only: the next fork is pid 1 of the new namespace
            try:
                pid = os.fork()
                if pid == 0:
                    try:
                        ours.close()
                        self._be_spare(theirs, kernel_id)
                    finally:
                        os._exit(1)
            finally:
                raw.setns(self._own, raw.CLONE_NEWPID)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    def _be_spare(self, zygote: socket.socket, kernel_id: int | None) -> None:
        """In the child: go as far as one can without knowing the session, and wait for it."""
        self._host.close()
        os.close(self._own)
        failed: OSError | ValueError | None = None
        try:
            enter_namespaces(kernel_id, self._proc)
        except (OSError, ValueError) as exc:
            failed = exc
            poll = select.poll()
            poll.register(zygote, select.POLLIN)
            if not poll.poll(0):
                return  # whoever is next may have more luck with a spare of its own
        order = control.receive(zygote)
        if order is None:
            return  # the zygote is gone
        message, fds = order
        mounts = fds[_CHANNELS : _CHANNELS + len(message["inputs"])]
        entrances = tuple(fds[_CHANNELS + len(mounts) :])
        plan = SessionConfinement(
            kernel_id=kernel_id,
            memory_mb=_limit(message, "memory_mb"),
            disk_mb=_limit(message, "disk_mb"),
            tasks=_limit(message, "tasks"),
            base_data=self._base.data,
            base_address_space=self._base.address_space,
            inputs=tuple(Input(name, directory, fd) for (name, directory), fd in zip(message["inputs"], mounts, strict=True)),
            landlock=self._base.landlock,
        )

        def confine() -> None:
            if failed is not None:
                raise failed
            confine_supervisor(plan)

        def make(to_host: socket.socket, seconds: float | None) -> Branch:
            return Branch(to_host, seconds, entrances=entrances)

        supervisor.main(confine, set(fds[_CHANNELS:]), fds[:_CHANNELS], message["seconds"], make)
