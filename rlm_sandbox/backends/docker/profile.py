"""The seccomp profile of a session's container, made from the tables of ``confine.seccomp``.

It is what runner, supervisor, relay and worker need together. The supervisor and the worker install their own,
narrower filters inside it; this one also holds for what they were before, and for a process that an attacker might start
beside them. Everything else fails with EPERM.
"""

from __future__ import annotations

import errno
import functools
import json
import sys
from typing import Any, Final

from ...confine.seccomp import SUPERVISOR

__all__ = ("seccomp_profile",)

#: Before the runner confines itself: the loader, the interpreter's start, and the self-test of mapped texts.
_START: Final = (
    "execve", "arch_prctl", "set_tid_address", "memfd_create", "capget", "setrlimit", "getdents", "geteuid", "readahead", "fadvise64",
)  # fmt: skip
#: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET: a container makes no namespaces.
_NAMESPACES: Final = 0x7E020000


#: The one domain in which it may make a socket, to connect to its host's.
_AF_UNIX: Final = 1


@functools.cache
def seccomp_profile(*, sockets: bool = False) -> str:
    """The profile as the engine takes it.

    ``sockets``: the runner connects to a socket of the host's before it confines itself, which then takes that away.
    """
    plain = sorted({*SUPERVISOR, *_START} - {"clone", "clone3", "vfork"})
    rules: list[dict[str, Any]] = [
        {"names": plain, "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": _NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
        },
        # glibc falls back to clone, whose flags a filter can read.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
    ]
    if sockets:
        domain = {"index": 0, "value": _AF_UNIX, "valueTwo": 0, "op": "SCMP_CMP_EQ"}
        rules.append({"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [domain]})
        rules.append({"names": ["connect"], "action": "SCMP_ACT_ALLOW"})
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    }
    return json.dumps(profile)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json.loads(seccomp_profile()), indent=1) + "\n")
