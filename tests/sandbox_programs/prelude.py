"""What the hostile programs share. What they might guess of the world outside comes on standard input."""

import ctypes
import json
import os
import sys

facts = json.loads(sys.stdin.readline() or "{}")
_libc = ctypes.CDLL(None, use_errno=True)


def attempt(what, action):
    """Do what must not succeed, and say whether it did."""
    try:
        result = action()
    except BaseException as error:
        print(f"contained {what}: {type(error).__name__}: {error}", flush=True)
        return None
    print(f"ESCAPED {what}: {result!r}"[:300], flush=True)
    return result


def system_call(number, *arguments):
    """A raw system call of x86-64; raises OSError."""
    converted = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
