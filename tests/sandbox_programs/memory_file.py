# Files without a name (memfd) do not exist here.
# ends: exit 0
import os

from prelude import attempt

attempt("memfd_create", lambda: os.memfd_create("store"))
