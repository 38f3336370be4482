# Its requests would pass by every filter.
# ends: exit 0
import ctypes

from prelude import attempt, system_call

attempt("io_uring_setup", lambda: system_call(425, 4, ctypes.create_string_buffer(120)))
attempt("io_uring_enter", lambda: system_call(426, 3, 1, 0, 0, 0, 0))
attempt("io_setup", lambda: system_call(206, 4, ctypes.byref(ctypes.c_uint64())))
