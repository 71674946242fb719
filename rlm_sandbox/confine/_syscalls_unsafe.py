"""The raw system calls, by ``ctypes``. The only place for them; every function raises OSError when the kernel refuses.

Loaded before confinement: nothing here opens a library later. x86-64 only: the tables of `seccomp` are, too.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import operator
import os
import struct
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_syscall: Final = _libc.syscall
_syscall.restype = ctypes.c_long

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_READ: Final = 23
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_NO_NEW_PRIVS: Final = 39
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_NR_PIVOT_ROOT: Final = 155
_NR_CLONE: Final = 56
_NR_SECCOMP: Final = 317
_NR_CAPSET: Final = 126
_NR_PIDFD_SEND_SIGNAL: Final = 424
_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_MOUNT_SETATTR: Final = 442
_NR_LANDLOCK_CREATE_RULESET: Final = 444
_NR_LANDLOCK_ADD_RULE: Final = 445
_NR_LANDLOCK_RESTRICT_SELF: Final = 446
_NR_CLOSE_RANGE: Final = 436

_AT_RECURSIVE: Final = 0x8000
_AT_FDCWD: Final = -100
_MOUNT_ATTR_RDONLY: Final = 0x1
_MOUNT_ATTR_NOSUID: Final = 0x2
_MOUNT_ATTR_NODEV: Final = 0x4
_MOUNT_ATTR_NOEXEC: Final = 0x8
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_GET_NOTIF_SIZES: Final = 3
_SIGCHLD: Final = 17
_SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
#: Since 5.19: once the supervisor has a notification, only a fatal signal interrupts the caller, so one call of the
#: guest is one notification even when it is stopped and continued meanwhile.
_SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522
_M_ARENA_MAX: Final = -8


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, flags: int) -> None:
    """setns(2); with a pidfd since Linux 5.8."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)), "setns")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() if data else None
    )
    _check(result, f"mount {kind or 'bind'} on {target}")


def umount(target: str, flags: int) -> None:
    """umount2(2)."""
    _check(_libc.umount2(target.encode(), ctypes.c_int(flags)), "umount")


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _check(_syscall(ctypes.c_long(_NR_PIVOT_ROOT), new.encode(), old.encode()), "pivot_root")


def make_read_only(path: str, *, recursive: bool) -> None:
    """mount_setattr(2), Linux 5.12: set read-only and nosuid; flags inherited from the host stay locked as they are."""
    attributes = struct.pack("<QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _syscall(
        ctypes.c_long(_NR_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        path.encode(),
        ctypes.c_uint(flags),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    _check(result, "mount_setattr")


def detached_mount(path: str) -> int:
    """open_tree(2), Linux 5.2: a descriptor of a mount of its own of what ``path`` names now, without what is mounted below it.
    It is read-only, without devices and without execution, before anybody else can hold it."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    result = _syscall(ctypes.c_long(_NR_OPEN_TREE), ctypes.c_int(_AT_FDCWD), os.fsencode(path), flags)
    tree = _check(result, "open_tree")
    wanted = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
    attributes = struct.pack("<QQQQ", wanted, 0, 0, 0)
    try:
        result = _syscall(
            ctypes.c_long(_NR_MOUNT_SETATTR),
            ctypes.c_int(tree),
            b"",
            ctypes.c_uint(_AT_EMPTY_PATH),
            attributes,
            ctypes.c_size_t(len(attributes)),
        )
        _check(result, "mount_setattr")
    except BaseException:
        os.close(tree)
        raise
    return tree


def attach_mount(tree: int, target: str) -> None:
    """move_mount(2), Linux 5.2: put a detached mount onto ``target``."""
    result = _syscall(
        ctypes.c_long(_NR_MOVE_MOUNT),
        ctypes.c_int(tree),
        b"",
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(target),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
    )
    _check(result, "move_mount")


def prctl(option: int, *args: int) -> int:
    """prctl(2)."""
    padded = [*args, 0, 0, 0, 0][:4]
    return _check(_libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(arg) for arg in padded)), f"prctl {option}")


def drop_capabilities() -> None:
    """Empty the bounding, ambient, permitted, effective and inheritable sets of this thread."""
    capability = 0
    while True:
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            if capability == 0:
                raise
            break  # EINVAL: beyond the kernel's last capability
        capability += 1
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("<Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    _check(_syscall(ctypes.c_long(_NR_CAPSET), header, bytes(24)), "capset")


def install_filter(program: bytes, *, listener: bool) -> int:
    """seccomp(2) with a classic BPF program of 8-byte instructions. Returns the listener's descriptor, or 0."""
    buffer = ctypes.create_string_buffer(program, len(program))
    prog = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    choices = [0]
    if listener:
        choices = [
            _SECCOMP_FILTER_FLAG_NEW_LISTENER | _SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
            _SECCOMP_FILTER_FLAG_NEW_LISTENER,
        ]
    result = -1
    for flags in choices:
        result = _syscall(ctypes.c_long(_NR_SECCOMP), ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(flags), prog)
        if result >= 0:
            return int(result)
    return _check(result, "seccomp")


def landlock_abi() -> int:
    """landlock_create_ruleset(2): the version in force. Raises OSError where there is none."""
    flags = ctypes.c_uint(_LANDLOCK_CREATE_RULESET_VERSION)
    return _check(_syscall(ctypes.c_long(_NR_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), flags), "landlock")


def landlock_ruleset(files: int, network: int | None = None, scopes: int | None = None) -> int:
    """landlock_create_ruleset(2): a descriptor of a rule set that handles these accesses; None where the version knows none."""
    attributes = struct.pack("<Q", files)
    if network is not None:
        attributes += struct.pack("<Q", network)
        if scopes is not None:
            attributes += struct.pack("<Q", scopes)
    size = ctypes.c_size_t(len(attributes))
    return _check(
        _syscall(ctypes.c_long(_NR_LANDLOCK_CREATE_RULESET), attributes, size, ctypes.c_uint(0)), "landlock_create_ruleset"
    )


def landlock_allow(ruleset: int, beneath: int, access: int) -> None:
    """landlock_add_rule(2): these accesses to the file, or to everything below the directory, behind a descriptor."""
    rule = struct.pack("<Qi", access, beneath)
    kind = ctypes.c_int(_LANDLOCK_RULE_PATH_BENEATH)
    result = _syscall(ctypes.c_long(_NR_LANDLOCK_ADD_RULE), ctypes.c_int(ruleset), kind, rule, ctypes.c_uint(0))
    _check(result, "landlock_add_rule")


def landlock_restrict(ruleset: int) -> None:
    """landlock_restrict_self(2)."""
    result = _syscall(ctypes.c_long(_NR_LANDLOCK_RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0))
    _check(result, "landlock_restrict_self")


def pidfd_send_signal(pidfd: int, number: int) -> None:
    """pidfd_send_signal(2) without siginfo."""
    result = _syscall(ctypes.c_long(_NR_PIDFD_SEND_SIGNAL), ctypes.c_int(pidfd), ctypes.c_int(number), None, ctypes.c_uint(0))
    _check(result, "pidfd_send_signal")


def seccomp_notifications() -> bool:
    """Whether the kernel can hand system calls to a supervisor: seccomp(2), SECCOMP_GET_NOTIF_SIZES. Changes nothing."""
    sizes = ctypes.create_string_buffer(6)
    return int(_syscall(ctypes.c_long(_NR_SECCOMP), ctypes.c_uint(_SECCOMP_GET_NOTIF_SIZES), ctypes.c_uint(0), sizes)) == 0


def fork_with(secret: int) -> int:
    """clone(2) as fork(2) does it, with ``secret`` in the sixth register, which the kernel ignores and a filter can read.

    The interpreter's own steps before and after a fork are taken; those of the C library (locks of allocator and streams) are
    not, so a child of a process whose other threads are in the C library just then may hang.
    """
    before, parent, child = (
        getattr(ctypes.pythonapi, f"PyOS_{name}") for name in ("BeforeFork", "AfterFork_Parent", "AfterFork_Child")
    )
    call = ctypes.PyDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    numbers = (_NR_CLONE, _SIGCHLD, 0, 0, 0, 0)
    clone = functools.partial(call, *map(ctypes.c_long, numbers), ctypes.c_ulong(secret))
    # No bytecode runs from the end of the steps before to the end of those after it: where another thread has asked for the
    # interpreter's lock, the next one would hand it over and wait until that thread has had it, which in the child there is not,
    # and which the locks that are held meanwhile may keep the parent's from. So all is one chain of functions in C: the call,
    # its answer kept, and the steps that are due by whether that is 0.
    pids: list[int] = []
    due = map((parent, child).__getitem__, map(operator.not_, pids))
    chain = (
        before,
        functools.partial(pids.extend, map(operator.call, (clone,))),
        functools.partial(next, map(operator.call, due)),
    )
    collecting = gc.isenabled()
    gc.disable()  # what it collects may have finalizers, which are bytecode
    list(map(operator.call, chain))
    number = ctypes.get_errno()
    if collecting:
        gc.enable()
    (pid,) = pids
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


def close_range(first: int, last: int) -> None:
    """close_range(2), Linux 5.9."""
    if first <= last:
        _check(
            _syscall(ctypes.c_long(_NR_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0)),
            "close_range",
        )


def close_all_except(keep: set[int]) -> None:
    """Close every descriptor that is not in ``keep``."""
    first = 0
    for fd in sorted(keep):
        close_range(first, fd - 1)
        first = fd + 1
    close_range(first, 0x7FFFFFFF)


def set_hostname(name: str) -> None:
    """sethostname(2)."""
    raw = name.encode()
    _check(_libc.sethostname(raw, ctypes.c_size_t(len(raw))), "sethostname")


def limit_malloc_arenas(count: int) -> None:
    """mallopt(M_ARENA_MAX): each arena reserves 64 MB of address space, which a thread per call would exhaust."""
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(count))


class _PhdrInfo(ctypes.Structure):
    _fields_ = (("addr", ctypes.c_void_p), ("name", ctypes.c_char_p))


def loaded_libraries() -> list[str]:
    """The paths by which the dynamic loader opened this process's shared libraries, by dl_iterate_phdr(3)."""
    found: list[str] = []

    def visit(info: ctypes._Pointer[_PhdrInfo], _size: int, _data: int | None) -> int:
        name = info.contents.name
        if name:
            found.append(os.fsdecode(name))
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_PhdrInfo), ctypes.c_size_t, ctypes.c_void_p)
    _libc.dl_iterate_phdr(kind(visit), None)
    return found
