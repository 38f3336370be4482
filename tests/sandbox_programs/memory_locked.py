# Memory cannot be locked.
# ends: exit 0
from prelude import attempt, system_call

attempt("mlockall", lambda: system_call(151, 3))
