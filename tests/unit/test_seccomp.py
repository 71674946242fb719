"""The allow-lists as data: every entry says why it is there, and a guest is never given what nothing of ours needs."""

from __future__ import annotations

import pytest

from rlm_sandbox.confine import seccomp

TABLES = {"worker": seccomp.WORKER, "supervisor": seccomp.SUPERVISOR, "engine": seccomp.ENGINE}
#: Ways to the host, its kernel or other processes: in no table, with no argument.
NEVER = (
    "socket", "connect", "bind", "listen", "accept", "accept4", "ptrace", "process_vm_readv", "process_vm_writev", "bpf",
    "perf_event_open", "io_uring_setup", "userfaultfd", "keyctl", "add_key", "mount", "umount2", "pivot_root", "chroot", "mknod",
    "mknodat", "unshare", "setns", "memfd_create", "shmget", "mq_open", "init_module", "kexec_load", "setuid", "setgid", "capset",
    "open_by_handle_at", "name_to_handle_at", "execveat", "personality", "quotactl", "swapon", "reboot", "inotify_init1", "fanotify_init",
    "sched_setaffinity", "sched_setscheduler", "setpriority", "setrlimit", "setsid", "chown", "fchown", "lchown", "fchownat",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_entry_has_a_reason_and_a_number(name: str) -> None:
    for call, rule in TABLES[name].items():
        assert len(rule.reason) > 8, f"{call} is allowed without a reason"
        assert call in seccomp.NUMBERS


@pytest.mark.parametrize("name", sorted(TABLES))
def test_no_table_has_what_leads_out(name: str) -> None:
    assert not set(NEVER) & set(TABLES[name])


def test_the_supervisor_has_what_its_worker_has() -> None:
    assert set(seccomp.WORKER) <= set(seccomp.SUPERVISOR)
    assert "execve" not in seccomp.SUPERVISOR
