# The program's own directory and Python itself stay.
# ends: exit 0
import os
import shutil

from prelude import attempt

here = os.path.dirname(os.path.abspath(__file__))
for path in (f"{here}/main.py", os.__file__, "/dev/null", "/usr/lib/os-release"):
    attempt(f"delete {path}", lambda path=path: os.unlink(path))
attempt("delete all", lambda: shutil.rmtree(here))
for directory in (here, "/dev", "/tmp", os.path.dirname(os.__file__) + "/json"):
    shutil.rmtree(directory, ignore_errors=True)
print("contained" if os.path.exists(f"{here}/main.py") and os.path.exists(os.__file__) else "ESCAPED")
