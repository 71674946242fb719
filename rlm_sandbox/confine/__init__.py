"""Confinement of a process by the Linux kernel: the steps, the seccomp filters, the raw system calls.

Standard library and relative imports only: this package is bundled into guests and runs there before any cell does.
"""
