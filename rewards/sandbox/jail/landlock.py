"""Landlock (linux/landlock.h): files, TCP, signals, abstract sockets denied without privileges, from Linux 5.13 on."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from .kernel import SYS_LANDLOCK_ADD, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_RESTRICT, system_call

EXECUTE, WRITE_FILE, READ_FILE, READ_DIRECTORY = 1, 2, 4, 8
READ = EXECUTE | READ_FILE | READ_DIRECTORY
TRUNCATE, DEVICE_IOCTL = 1 << 14, 1 << 15
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | DEVICE_IOCTL
"""Rights that a rule about a file, not a directory, may have."""
_ALL_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_BIND_AND_CONNECT, _SIGNALS_AND_ABSTRACT_SOCKETS = 3, 3


def version() -> int:
    """Of the kernel's Landlock; raises OSError where there is none."""
    return system_call(SYS_LANDLOCK_CREATE, "landlock", 0, 0, 1)


def restrict(readable: Iterable[str], writable: Iterable[str], changeable: Iterable[str]) -> int:
    """Deny this process, and all it starts, every file but these, and everything else that this kernel's version can.

    Args:
        readable: files and directories to read and execute.
        writable: files, such as /dev/null, to read and write.
        changeable: directories in which anything may be done.

    Returns:
        The version in force: from 4 on TCP is denied, from 6 on signals to others and abstract sockets.
    """
    active = version()
    everything = _ALL_OF_VERSION[max(known for known in _ALL_OF_VERSION if known <= active)]
    attributes = (ctypes.c_uint64 * 3)(
        everything, _BIND_AND_CONNECT if active >= 4 else 0, _SIGNALS_AND_ABSTRACT_SOCKETS if active >= 6 else 0
    )
    size = 24 if active >= 6 else 16 if active >= 4 else 8
    ruleset = system_call(SYS_LANDLOCK_CREATE, "landlock_create_ruleset", ctypes.byref(attributes), size, 0)
    try:
        for paths, rights in ((readable, READ), (writable, READ | WRITE_FILE | TRUNCATE), (changeable, everything)):
            for path in paths:
                _allow(ruleset, path, rights & everything)
        system_call(SYS_LANDLOCK_RESTRICT, "landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
    return active


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(rights.to_bytes(8, "little") + descriptor.to_bytes(4, "little"))
        system_call(SYS_LANDLOCK_ADD, f"landlock_add_rule {path}", ruleset, 1, ctypes.byref(rule), 0)
    finally:
        os.close(descriptor)
