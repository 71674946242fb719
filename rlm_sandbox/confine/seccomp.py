"""Seccomp filters: an allow-list as data, and the classic BPF program made of it.

Everything that is not named here fails with EPERM. The argument rules close the holes that were used against
prototypes of this jail; ``facts`` beside each rule say which. x86-64 only; x32 and foreign architectures are killed.
"""

from __future__ import annotations

import errno
import functools
import struct
from dataclasses import dataclass
from typing import Final

__all__ = (
    "ENGINE",
    "LAST",
    "NUMBERS",
    "SUPERVISOR",
    "WORKER",
    "Arg",
    "Rule",
    "build_filter",
    "build_refusal",
    "supervisor_program",
    "worker_program",
    "worker_without_notifier",
)

_AUDIT_ARCH_X86_64: Final = 0xC000003E
_X32_BIT: Final = 0x40000000

_RET_KILL_PROCESS: Final = 0x80000000
_RET_ERRNO: Final = 0x00050000
_RET_USER_NOTIF: Final = 0x7FC00000
_RET_ALLOW: Final = 0x7FFF0000

_LD_W_ABS: Final = 0x20
_ALU_AND_K: Final = 0x54
_JEQ_K: Final = 0x15
_JGT_K: Final = 0x25
_JGE_K: Final = 0x35
_RET_K: Final = 0x06


@dataclass(frozen=True, slots=True)
class Arg:
    """Argument ``index`` (0 to 5), and-ed with ``mask``, must be one of ``values``. ``wide`` compares all 64 bits with 0.

    ``below`` instead of ``values``: all 64 bits, as an unsigned number, must be less.
    """

    index: int
    values: tuple[int, ...] = ()
    mask: int = 0xFFFFFFFF
    wide: bool = False
    below: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to a system call: allowed if each of ``args`` holds, else EPERM. ``action`` may ask the supervisor.

    ``reason``: why a guest needs it, and why a hostile one may have it so.
    """

    action: int = _RET_ALLOW
    args: tuple[Arg, ...] = ()
    reason: str = ""


#: glibc falls back to clone, whose flags a filter can read; clone3 passes them in memory, which it cannot.
_ABSENT: Final = Rule(
    _RET_ERRNO | errno.ENOSYS, reason="as on a kernel without it: its flags are in memory, where no filter sees them"
)

#: Between where Linux puts mappings and where it puts the main stack on x86-64, wherever it randomizes them: the stack's
#: top is less than 16 GiB below 2**47, and the mappings begin at least 16 GiB, the stack's limit and 128 MiB below it.
_STACK_FLOOR: Final = 0x7FFB_F800_0000

#: The exact flags with which glibc and musl make a thread.
_THREAD_FLAGS: Final = (0x3D0F00, 0x7D0F00)
#: What glibc's fork passes: CLONE_CHILD_CLEARTID | CLONE_CHILD_SETTID | SIGCHLD.
_FORK_FLAGS: Final = (0x01200011, 0x11)

_XATTR: Final = (
    "setxattr", "lsetxattr", "fsetxattr", "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr",
)  # fmt: skip

#: Allowed whatever their arguments, by the reason why a Python needs them and why a hostile one may have them.
_PLAIN: Final[tuple[tuple[str, str], ...]] = (
    (
        "bytes through descriptors it holds: channel, output pipes, files of its tree",
        "read write readv writev pread64 pwrite64 preadv pwritev lseek sendfile copy_file_range",
    ),
    (
        "its own descriptors; RLIMIT_NOFILE bounds their number",
        "close dup dup2 dup3 pipe pipe2 eventfd2",
    ),
    (
        "files of its tree, which is read-only but for /tmp, a tmpfs with a quota",
        (
            "open openat stat lstat fstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink "
            "readlinkat getdents64 getcwd chdir fchdir umask"
        ),
    ),
    (
        "changes of files: only /tmp lets them happen",
        (
            "ftruncate truncate fallocate fsync fdatasync msync rename renameat renameat2 mkdir mkdirat rmdir "
            "unlink unlinkat link linkat symlink symlinkat chmod fchmodat utimensat"
        ),
    ),
    (
        "its own memory; what it adds is counted by RLIMIT_DATA and RLIMIT_AS",
        "mprotect munmap brk",
    ),
    (
        "waiting for descriptors",
        "poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait",
    ),
    (
        "the socket pairs it holds or makes; there is no other socket, and datagrams to a path need one",
        "sendto recvfrom recvmsg shutdown getsockname getpeername",
    ),
    (
        "threads: locks, and what glibc registers for each",
        "futex set_robust_list get_robust_list rseq membarrier",
    ),
    (
        "clocks and sleep; the turn's time is measured on the host",
        "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage",
    ),
    (
        "what it is: numbers of its own namespaces, and facts of the kernel that limitations/jail.md lists",
        (
            "getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid getpgrp getpgid "
            "getsid uname sysinfo getrlimit getcpu sched_yield sched_getaffinity"
        ),
    ),
    (
        "random bytes",
        "getrandom",
    ),
    (
        "signals to itself and timers of its own; no handler outlives SIGKILL",
        (
            "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack "
            "alarm setitimer getitimer pause restart_syscall"
        ),
    ),
    (
        "its end, and that of its children, of which the standby is the only one",
        "exit exit_group wait4 waitid",
    ),
)

#: The worker: what a CPython without files of the host, network and children needs. Not fchmod: a context's descriptor
#: belongs to a file that other sessions open, and on an ordinary user's host the guest is that file's owner.
WORKER: Final[dict[str, Rule]] = {
    **{name: Rule(reason=reason) for reason, names in _PLAIN for name in names.split()},
    "mmap": Rule(
        args=(Arg(3, (0x00, 0x01, 0x20), mask=0x21), Arg(3, (0,), mask=0x40100)),
        reason="No GROWSDOWN or HUGETLB, and no SHARED together with ANONYMOUS: RLIMIT_DATA does not count them",
    ),
    "mremap": Rule(
        args=(Arg(0, below=_STACK_FLOOR),),
        reason="Not the main stack: a piece of it that is moved and enlarged stays a stack, which RLIMIT_DATA does not count",
    ),
    "madvise": Rule(
        args=(Arg(2, (0, 1, 2, 3, 4, 8, 14, 15)),),
        reason="Ordinary advice only: DONTFORK and WIPEONFORK would sabotage the standby, REMOVE and HWPOISON reach beyond it",
    ),
    "fcntl": Rule(
        args=(Arg(1, (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)),),
        reason=(
            "DUPFD, GETFD, SETFD, GETFL, SETFL, GETLK, SETLK, SETLKW, DUPFD_CLOEXEC, GETPIPE_SZ; F_SETOWN with F_SETSIG(SIGKILL) "
            "kills a sibling where kill() is refused, F_SETPIPE_SZ pins 30 MB of kernel memory"
        ),
    ),
    "ioctl": Rule(
        args=(Arg(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
        reason="TCGETS (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX; not FIOSETOWN or SIOCSPGRP (as F_SETOWN)",
    ),
    "prlimit64": Rule(
        args=(Arg(0, (0,)), Arg(2, (0,), wide=True)),
        reason="Reading one's own limits. Setting them, or another's: prlimit(1, RLIMIT_CPU, 0) kills the supervisor",
    ),
    "prctl": Rule(args=(Arg(0, (15, 16)),), reason="PR_SET_NAME and PR_GET_NAME: not PDEATHSIG, DUMPABLE or SUBREAPER"),
    "getsockopt": Rule(
        args=(Arg(1, (1,)), Arg(2, (3, 4, 7, 8, 30, 38, 39))),
        reason="SO_TYPE, SO_ERROR, SO_SNDBUF, SO_RCVBUF, SO_ACCEPTCONN, SO_PROTOCOL, SO_DOMAIN: not SO_PEERPIDFD, a handle to the host",
    ),
    "socketpair": Rule(
        args=(Arg(0, (1,)), Arg(1, (1,), mask=0xFFF7F7FF)),
        reason="A stream pair for asyncio's self-pipe. socket() itself is not here: no network, no unix path",
    ),
    "clone": Rule(
        _RET_USER_NOTIF, reason="Threads. Processes only with the supervisor's word, which it gives to the runner between cells"
    ),
    "fork": Rule(
        _RET_USER_NOTIF, reason="Threads. Processes only with the supervisor's word, which it gives to the runner between cells"
    ),
    "vfork": Rule(
        _RET_USER_NOTIF, reason="Threads. Processes only with the supervisor's word, which it gives to the runner between cells"
    ),
    "clone3": _ABSENT,
    "setpgid": Rule(
        _RET_USER_NOTIF, reason="Threads. Processes only with the supervisor's word, which it gives to the runner between cells"
    ),
    **dict.fromkeys(
        _XATTR,
        Rule(
            _RET_ERRNO | errno.EOPNOTSUPP,
            reason="As on a file system without extended attributes: shutil.copy2 goes on without them",
        ),
    ),
    "kill": Rule(_RET_USER_NOTIF, reason="Signals to oneself; never to the supervisor or the standby"),
    "tgkill": Rule(_RET_USER_NOTIF, reason="Signals to oneself; never to the supervisor or the standby"),
    "sendmsg": Rule(reason="For the worker's own last steps only, see LAST"),
    "seccomp": Rule(reason="For the worker's own last steps only, see LAST"),
}

#: Refused once the worker has handed over its notifier, before any cell code: a descriptor on its way through a socket
#: counts against the whole user, so one guest could keep the supervisors of others from sending theirs.
LAST: Final = ("sendmsg", "seccomp")

#: The supervisor, which never runs cell code; the worker inherits this filter too, so it must contain the worker's.
SUPERVISOR: Final[dict[str, Rule]] = {
    **WORKER,
    **{
        name: Rule(reason=reason)
        for reason, names in (
            ("ends the worker's group, stops and wakes standby and worker, by handle where there is one",
             "kill tgkill setpgid pidfd_open pidfd_send_signal"),
            ("answers the worker's notifications", "ioctl"),
            ("sets its own descriptors up, and closes what a worker must not have", "fcntl close_range setsockopt"),
            ("a worker's own last steps: its name, its filter, its limits", "prctl seccomp prlimit64"),
            ("forks the worker", "fork"),
        )
        for name in names.split()
    },
    "clone": Rule(args=(Arg(0, (*_FORK_FLAGS, *_THREAD_FLAGS)),), reason="forks the worker; a worker makes threads"),
    "vfork": Rule(_RET_ERRNO | errno.EPERM, reason="nothing of ours uses it"),
    "socketpair": Rule(args=(Arg(0, (1,)),), reason="the channel on which a worker is born"),
}  # fmt: skip

#: An engine's own worker program (Monty's), from the step before its execution: it reads, writes and allocates.
ENGINE: Final[dict[str, Rule]] = {
    **dict.fromkeys(
        """
        read write readv writev close fstat newfstatat openat access pread64 lseek poll
        mprotect munmap brk futex set_robust_list set_tid_address arch_prctl rseq
        clock_gettime clock_getres clock_nanosleep gettimeofday getrandom sched_getaffinity sched_yield gettid getpid
        rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack exit exit_group restart_syscall
        execve
        """.split(),
        Rule(reason="a program in Rust that reads requests, computes and answers; its tree holds nothing else"),
    ),
    "mmap": WORKER["mmap"],
    "mremap": WORKER["mremap"],
    "madvise": WORKER["madvise"],
    "prlimit64": WORKER["prlimit64"],
    "prctl": WORKER["prctl"],
    "clone": Rule(args=(Arg(0, _THREAD_FLAGS),), reason="threads; no process"),
    "clone3": _ABSENT,
}

NUMBERS: Final[dict[str, int]] = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
    "mremap": 25, "msync": 26, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37,
    "setitimer": 38, "getpid": 39, "sendfile": 40, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
    "getsockname": 51, "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56, "fork": 57,
    "vfork": 58, "execve": 59, "exit": 60, "wait4": 61, "kill": 62, "uname": 63, "fcntl": 72, "fsync": 74, "fdatasync": 75, "truncate": 76,
    "ftruncate": 77, "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87,
    "symlink": 88, "readlink": 89, "chmod": 90, "fchmod": 91, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
    "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "setpgid": 109, "getppid": 110,
    "getpgrp": 111, "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "prctl": 157, "arch_prctl": 158, "gettid": 186,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194,
    "llistxattr": 195, "flistxattr": 196, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234,
    "waitid": 247, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265,
    "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "get_robust_list": 274, "utimensat": 280, "epoll_pwait": 281, "fallocate": 285, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296, "prlimit64": 302, "getcpu": 309,
    "renameat2": 316, "seccomp": 317, "getrandom": 318, "membarrier": 324, "copy_file_range": 326, "statx": 332, "rseq": 334,
    "pidfd_send_signal": 424, "pidfd_open": 434, "clone3": 435, "close_range": 436, "faccessat2": 439,
}  # fmt: skip


def _instruction(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, k)


def _check_arg(arg: Arg) -> list[bytes]:
    """Instructions that fall through if the argument is allowed and otherwise return EPERM."""
    low = 16 + 8 * arg.index
    deny = _instruction(_RET_K, _RET_ERRNO | errno.EPERM)
    if arg.below is not None:
        high_bound, low_bound = arg.below >> 32, arg.below & 0xFFFFFFFF
        return [
            _instruction(_LD_W_ABS, low + 4), _instruction(_JGT_K, high_bound, 3, 0), _instruction(_JEQ_K, high_bound, 0, 3),
            _instruction(_LD_W_ABS, low), _instruction(_JGE_K, low_bound, 0, 1), deny,
        ]  # fmt: skip
    if arg.wide:
        return [
            _instruction(_LD_W_ABS, low), _instruction(_JEQ_K, 0, 1, 0), deny,
            _instruction(_LD_W_ABS, low + 4), _instruction(_JEQ_K, 0, 1, 0), deny,
        ]  # fmt: skip
    code = [_instruction(_LD_W_ABS, low)]
    if arg.mask != 0xFFFFFFFF:
        code.append(_instruction(_ALU_AND_K, arg.mask))
    count = len(arg.values)
    # Each comparison jumps over the rest and the denial when it matches.
    code += [_instruction(_JEQ_K, value, count - position, 0) for position, value in enumerate(arg.values)]
    code.append(deny)
    return code


def worker_without_notifier(pid: int) -> dict[str, Rule]:
    """The worker's list for a kernel that cannot ask a supervisor: what is asked elsewhere is decided by arguments alone.

    ``pid``: the worker's own, the only process it may signal. A standby that took its place may signal nobody.
    ``clone`` is left to `build_filter`, with a secret.
    """
    itself = Rule(args=(Arg(0, (pid,)),))
    return {
        **WORKER,
        "kill": itself,
        "tgkill": itself,
        "setpgid": Rule(args=(Arg(0, (0,)), Arg(1, (0,)))),  # a standby leaves its worker's group
        "fork": Rule(_RET_ERRNO | errno.EPERM),
        "vfork": Rule(_RET_ERRNO | errno.EPERM),
    }


def build_filter(rules: dict[str, Rule], fork_secret: int | None = None) -> bytes:
    """The BPF program for an allow-list. Thread-making clones are allowed where ``clone`` asks the supervisor.

    ``fork_secret``: instead of asking, allow a fork that has this 64-bit number in the sixth register.
    """
    program = [
        _instruction(_LD_W_ABS, 4),
        _instruction(_JEQ_K, _AUDIT_ARCH_X86_64, 1, 0),
        _instruction(_RET_K, _RET_KILL_PROCESS),
        _instruction(_LD_W_ABS, 0),
        _instruction(_JGE_K, _X32_BIT, 0, 1),
        _instruction(_RET_K, _RET_KILL_PROCESS),
    ]
    for name, rule in rules.items():
        body = [instruction for arg in rule.args for instruction in _check_arg(arg)]
        if name == "clone" and rule.action == _RET_USER_NOTIF:
            # The flags are in a register, so the exact thread masks can be let through without asking.
            body += [
                _instruction(_LD_W_ABS, 16),
                *(_instruction(_JEQ_K, flags, 0, 1) + _instruction(_RET_K, _RET_ALLOW) for flags in _THREAD_FLAGS),
            ]
        if name == "clone" and fork_secret is not None:
            body += [
                *_check_arg(Arg(0, _FORK_FLAGS)),
                *_check_arg(Arg(5, (fork_secret & 0xFFFFFFFF,))),
                _instruction(_LD_W_ABS, 16 + 8 * 5 + 4), _instruction(_JEQ_K, fork_secret >> 32, 1, 0),
                _instruction(_RET_K, _RET_ERRNO | errno.EPERM),
                _instruction(_RET_K, _RET_ALLOW),
            ]  # fmt: skip
        body.append(_instruction(_RET_K, rule.action))
        length = sum(len(part) for part in body) // 8
        program += [_instruction(_JEQ_K, NUMBERS[name], 0, length), *body]
    program.append(_instruction(_RET_K, _RET_ERRNO | errno.EPERM))
    return b"".join(program)


@functools.cache
def supervisor_program() -> bytes:
    """The program of `SUPERVISOR`, built once: in a zygote, before it forks."""
    return build_filter(SUPERVISOR)


@functools.cache
def worker_program() -> bytes:
    """The program of `WORKER`, built once."""
    return build_filter(WORKER)


def build_refusal(names: tuple[str, ...]) -> bytes:
    """The BPF program that refuses these system calls and leaves the rest to the filters before it."""
    program = [_instruction(_LD_W_ABS, 0)]
    for name in names:
        program += [_instruction(_JEQ_K, NUMBERS[name], 0, 1), _instruction(_RET_K, _RET_ERRNO | errno.EPERM)]
    program.append(_instruction(_RET_K, _RET_ALLOW))
    return b"".join(program)
