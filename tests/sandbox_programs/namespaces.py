# No namespaces of its own, in which it could be root.
# ends: exit 0
import ctypes

from prelude import attempt, system_call

for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x08000000, 0x04000000, 0x02000000, 0x80):
    attempt(f"unshare {flag:x}", lambda flag=flag: system_call(272, flag))
    attempt(f"clone {flag:x}", lambda flag=flag: system_call(56, flag | 17, 0, 0, 0, 0))
arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
attempt("clone3", lambda: system_call(435, ctypes.byref(arguments), 88))
attempt("setns", lambda: system_call(308, 0, 0))
