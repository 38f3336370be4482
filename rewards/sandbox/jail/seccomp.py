"""The system calls that a program may make: a list of what Python needs; everything else fails.

The filter is classic BPF over `struct seccomp_data {int nr; u32 arch; u64 instruction_pointer; u64 args[6]}`
(linux/seccomp.h, linux/bpf_common.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterable

from .kernel import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    PR_SET_SECCOMP,
    prctl,
)

# fmt: off
FILES = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "dup": 32, "dup2": 33, "sendfile": 40,
    "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getdents": 78,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86,
    "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90, "fchmod": 91, "umask": 95, "utime": 132, "statfs": 137,
    "fstatfs": 138, "getdents64": 217, "fadvise64": 221, "utimes": 235, "openat": 257, "mkdirat": 258,
    "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267,
    "fchmodat": 268, "faccessat": 269, "utimensat": 280, "fallocate": 285, "dup3": 292, "pipe2": 293, "preadv": 295,
    "pwritev": 296, "renameat2": 316, "copy_file_range": 326, "statx": 332, "close_range": 436, "faccessat2": 439,
}
MEMORY = {"mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28}
WAITING = {
    "poll": 7, "select": 23, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38,
    "gettimeofday": 96, "time": 201, "futex": 202, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "epoll_wait": 232, "epoll_ctl": 233, "pselect6": 270, "ppoll": 271, "epoll_pwait": 281, "eventfd2": 290,
    "epoll_create1": 291,
}
# Connected pairs are how asyncio and multiprocessing wake and talk to themselves; they cannot be bound or connected.
# Without setsockopt their buffers keep their size: it is the kernel's memory, which no limit of ours counts.
SOCKET_PAIRS = {
    "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "getsockname": 51, "getpeername": 52,
    "getsockopt": 55,
}
PROCESS = {
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "getpid": 39, "execve": 59,
    "exit": 60, "wait4": 61, "uname": 63, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "setpgid": 109, "getppid": 110, "getpgrp": 111,
    "setsid": 112, "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124,
    "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "getpriority": 140,
    "sched_getparam": 143, "sched_getscheduler": 145, "sched_get_priority_max": 146, "sched_get_priority_min": 147,
    "arch_prctl": 158, "gettid": 186, "sched_getaffinity": 204, "set_tid_address": 218, "exit_group": 231,
    "waitid": 247, "set_robust_list": 273, "get_robust_list": 274, "prlimit64": 302, "getrandom": 318,
    "membarrier": 324, "rseq": 334,
}
OTHERS = {"fork": 57, "vfork": 58, "kill": 62, "tgkill": 234}
# fmt: on
IOCTL, SOCKETPAIR, CLONE, FCNTL, PRCTL, CLONE3 = 16, 53, 56, 72, 157, 435
"""Allowed for some of their arguments."""
TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
THREAD_NAMES = (15, 16)
"""prctl: PR_SET_NAME, PR_GET_NAME."""
AF_UNIX = 1
F_SETPIPE_SZ = 1031
CLONE_THREAD = 0x00010000
NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | 0x80
)
FIRST_RECENT = 424
"""Programs learn that they are on an older kernel; glibc has other ways then."""

_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X86_64, _X32_BIT = 0xC000003E, 0x40000000

Instruction = tuple[int, int, int, int]
"""Code, offset when true, offset when false, operand."""


def _answer(code: int) -> Instruction:
    return (_RETURN, 0, 0, code)


def _error(number: int) -> Instruction:
    return _answer(_ERROR | number)


def _argument(number: int, call: int, index: int, allowed: Iterable[int]) -> list[Instruction]:
    """For system call `call`: allow it if the low half of an argument is one of some values."""
    body: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENTS + 8 * index)]
    for value in allowed:
        body += [(_EQUAL, 0, 1, value), _answer(_ALLOW)]
    body.append(_error(number))
    return [(_EQUAL, 0, len(body), call), *body]


def program(alone: bool) -> list[Instruction]:
    """The filter.

    Args:
        alone: nothing else keeps the program from other processes of its user, so it may neither start nor signal any.
    """
    calls = [*FILES.values(), *MEMORY.values(), *WAITING.values(), *SOCKET_PAIRS.values(), *PROCESS.values()]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _X86_64),
        _answer(_KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32_BIT),
        _answer(_KILL),
    ]
    for call in calls if alone else [*calls, *OTHERS.values()]:
        code += [(_EQUAL, 0, 1, call), _answer(_ALLOW)]
    code += [(_EQUAL, 0, 1, CLONE3), _error(errno.ENOSYS)]  # its flags lie in memory, where a filter cannot look
    code += _argument(errno.ENOTTY, IOCTL, 1, TERMINAL_QUESTIONS)
    code += _argument(errno.EPERM, PRCTL, 0, THREAD_NAMES)
    code += _argument(errno.EPERM, SOCKETPAIR, 0, [AF_UNIX])
    code += [(_EQUAL, 0, 4, FCNTL), (_LOAD, 0, 0, _ARGUMENTS + 8), (_EQUAL, 0, 1, F_SETPIPE_SZ)]
    code += [_error(errno.EPERM), _answer(_ALLOW)]
    flags = [(_ANY_BIT, 0, 1, NAMESPACES), _error(errno.EPERM)]
    if alone:
        flags += [(_ANY_BIT, 1, 0, CLONE_THREAD), _error(errno.EPERM)]
    code += [(_EQUAL, 0, len(flags) + 2, CLONE), (_LOAD, 0, 0, _ARGUMENTS), *flags, _answer(_ALLOW)]
    return [*code, (_AT_LEAST, 0, 1, FIRST_RECENT), _error(errno.ENOSYS), _error(errno.EPERM)]


def install(alone: bool) -> None:
    """Put this process and all it starts under the filter, for good. Needs no privileges after `no_new_privs`.

    Raises:
        OSError: the kernel does not allow it, or this is not x86-64.
    """
    machine = os.uname().machine
    if machine != "x86_64" or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"there is no list of system calls for {machine}")
    instructions = program(alone)
    load(instructions)


def load(instructions: list[Instruction]) -> None:
    """Install any filter."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, 2, ctypes.byref(header))
