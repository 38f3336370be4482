# Not even a file with holes may be large.
# ends: exit 0
import os
import signal

from prelude import attempt

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
descriptor = os.open("/tmp/holes", os.O_CREAT | os.O_RDWR)
attempt("a file of 1 TiB", lambda: os.truncate(descriptor, 2**40))
attempt("writing far out", lambda: os.pwrite(descriptor, b"x", 2**40))
attempt("fallocate", lambda: os.posix_fallocate(descriptor, 0, 2**30))
