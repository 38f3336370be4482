# There is no shell and no other program.
# ends: exit 0
import os
import subprocess

from prelude import attempt

for path in ("/bin/sh", "/usr/bin/env", "/usr/bin/curl", "/sbin/reboot"):
    attempt(path, lambda path=path: subprocess.run([path, "-c", "id"], check=True))
if os.system("id") == 0:
    print("ESCAPED")
