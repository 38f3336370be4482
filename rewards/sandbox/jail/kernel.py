"""Linux calls that Python 3.11 has no function for, by ctypes. All raise OSError."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4

# These have one number on every architecture.
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446

_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def system_call(number: int, what: str, *arguments: object) -> int:
    """Any system call; integers are passed as C longs."""
    converted = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *converted), what)


def unshare(flags: int) -> None:
    """Move this process (with CLONE_NEWPID: its children) into new namespaces."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    _checked(result, f"mount {target}")


def detach_mount(target: str) -> None:
    """Take a mount out of the tree; who has it open keeps it."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def pivot_root(new_root: str) -> None:
    """Make `new_root`, a mount point, the root of this mount namespace; the old one is gone."""
    number = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    os.chdir(new_root)
    system_call(number, "pivot_root", ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
    detach_mount(".")
    os.chdir("/")


def set_mount_attributes(path: str, attributes: int) -> None:
    """Add attributes (MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC have the same values here) to a whole mount tree."""
    structure = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    system_call(
        SYS_MOUNT_SETATTR,
        f"mount_setattr {path}",
        _AT_FDCWD,
        ctypes.c_char_p(path.encode()),
        _AT_RECURSIVE,
        ctypes.byref(structure),
        ctypes.sizeof(structure),
    )


def prctl(option: int, argument: int = 0, pointer: object = 0) -> None:
    """prctl(2) with up to two arguments."""
    second = ctypes.c_ulong(pointer) if isinstance(pointer, int) else pointer
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), second, zero, zero), f"prctl {option}")


def drop_bounding_set() -> None:
    """Give up the right to gain a capability by executing a file. Without CAP_SETPCAP there is none to gain."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # no such capability in this kernel, or not ours to drop
            break


def drop_capabilities() -> None:
    """Give up every capability, and the right to gain privileges by executing a file."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(data)), "capset")
