# Nothing of the machine's files but Python and its libraries is there.
# ends: exit 0
import os

from prelude import attempt, facts

for path in (
    facts["secret"],
    facts["harness"],
    "/etc/shadow",
    "/etc/passwd",
    "/root/.ssh",
    "/home",
    "/var/log",
    "/sys",
):
    attempt(path, lambda path=path: os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(10))
