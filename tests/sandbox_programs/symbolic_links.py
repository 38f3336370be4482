# A link is a name: it leads to nothing that the program could not reach anyway.
# ends: exit 0
import os

from prelude import attempt, facts

for number, target in enumerate([facts["secret"], "/etc/shadow", "/proc/1/root", "/proc/self/exe", "../../etc/passwd"]):
    os.symlink(target, f"/tmp/link{number}")
    attempt(f"through {target}", lambda number=number: open(f"/tmp/link{number}", "rb").read(10))
os.symlink(facts["open"], "/tmp/outside")
attempt("write through a link", lambda: open("/tmp/outside/hostile", "w"))
