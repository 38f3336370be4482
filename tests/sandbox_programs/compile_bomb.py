# A small text that compiles to gigabytes.
# ends: any
from prelude import attempt

attempt("nested", lambda: compile("(" * 10**6 + ")" * 10**6, "bomb", "eval"))
attempt("run", lambda: len(eval("(1,) * 10**9")))
