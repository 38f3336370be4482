# One large request fails.
# ends: exit 0
from prelude import attempt

attempt("allocate 1 GiB", lambda: len(bytearray(2**30)))
