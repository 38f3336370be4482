# The kernel's keys.
# ends: exit 0
import ctypes

from prelude import attempt, system_call

kind, name = ctypes.c_char_p(b"user"), ctypes.c_char_p(b"hostile")
attempt("add_key", lambda: system_call(248, kind, name, name, 7, -3))
attempt("request_key", lambda: system_call(249, kind, name, 0, -3))
attempt("keyctl", lambda: system_call(250, 0, -3, 0, 0, 0))
