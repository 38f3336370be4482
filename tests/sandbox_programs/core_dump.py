# A crash leaves no core.
# ends: exit -6
import os
import resource

from prelude import attempt

attempt("allow cores", lambda: resource.setrlimit(resource.RLIMIT_CORE, (2**30, 2**30)))
if os.fork() == 0:
    os.abort()
os.wait()
if "core" in str(os.listdir("/tmp")):
    print("ESCAPED", os.listdir("/tmp"))
os.abort()
