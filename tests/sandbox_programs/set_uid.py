# No other user can be become, and set-uid files do nothing.
# ends: exit 0
import os
import shutil
import subprocess
import sys

from prelude import attempt

attempt("setuid", lambda: os.setuid(0))
attempt("setresuid", lambda: os.setresuid(0, 0, 0))
attempt("setgid", lambda: os.setgid(0))
attempt("setgroups", lambda: os.setgroups([0]))
attempt("chown", lambda: os.chown("/tmp", 0, 0))
shutil.copy(sys.executable, "/tmp/python")
os.chmod("/tmp/python", 0o6755)
attempt("execute from /tmp", lambda: subprocess.run(["/tmp/python", "-c", "pass"], check=True))
attempt("su", lambda: subprocess.run(["/usr/bin/su", "-c", "id"], check=True))
