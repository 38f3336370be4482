# There is no /proc.
# ends: exit 0
import os

from prelude import attempt, facts

for name in ("1", "self", str(os.getppid()), str(facts["caller"]), str(facts["bystander"])):
    for file in ("environ", "cmdline", "mem", "maps", "fd/0", "root/etc/passwd", "cwd"):
        attempt(f"/proc/{name}/{file}", lambda name=name, file=file: open(f"/proc/{name}/{file}", "rb").read(10))
print("ESCAPED" if os.listdir("/proc") else "contained: /proc is empty")
