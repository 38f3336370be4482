# The memory and descriptors of others are out of reach.
# ends: exit 0
import ctypes
import os

from prelude import attempt, facts, system_call

buffer = ctypes.create_string_buffer(64)
local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 64)
for target in (os.getppid(), facts["caller"], facts["bystander"]):
    for number in (310, 311):
        attempt(
            f"process_vm {number} {target}",
            lambda n=number, t=target: system_call(n, t, ctypes.byref(local), 1, ctypes.byref(local), 1, 0),
        )
    attempt(f"pidfd_open {target}", lambda target=target: system_call(434, target, 0))
    attempt(f"kcmp {target}", lambda target=target: system_call(312, target, os.getpid(), 0, 0, 0))
