# Files outside /tmp cannot be linked into it.
# ends: exit 0
import os
import sys

from prelude import attempt, facts

for target in (facts["secret"], "/program/main.py", sys.executable, "/dev/null"):
    attempt(f"link {target}", lambda target=target: os.link(target, "/tmp/link"))
attempt("rename", lambda: os.rename("/program", "/tmp/program"))
