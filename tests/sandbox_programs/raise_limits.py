# Limits only go down.
# ends: exit 0
import resource

from prelude import attempt

for name in ("AS", "CPU", "NPROC", "NOFILE", "FSIZE", "CORE", "MEMLOCK"):
    what = getattr(resource, f"RLIMIT_{name}")
    _, most = resource.getrlimit(what)
    attempt(name, lambda what=what, most=most: resource.setrlimit(what, (most + 1, most + 1)))
