# Nobody can be traced.
# ends: exit 0
import os

from prelude import attempt, facts, system_call

for target in (os.getppid(), 1, facts["caller"], facts["bystander"]):
    attempt(f"attach to {target}", lambda target=target: system_call(101, 16, target, 0, 0))
    attempt(f"seize {target}", lambda target=target: system_call(101, 0x4206, target, 0, 0))
attempt("trace me", lambda: system_call(101, 0, 0, 0, 0))
