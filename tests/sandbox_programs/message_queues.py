# Memory of the kernel's that outlives processes: System V and POSIX queues.
# ends: exit 0
import ctypes

from prelude import attempt, system_call

attempt("shmget", lambda: system_call(29, 0, 2**20, 0o1666))
attempt("semget", lambda: system_call(64, 0, 10, 0o1666))
attempt("msgget", lambda: system_call(68, 0, 0o1666))
attempt("mq_open", lambda: system_call(240, ctypes.c_char_p(b"hostile"), 0o102, 0o666, 0))
