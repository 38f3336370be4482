# Kernel memory in pipes is bounded by their number and size.
# ends: exit 0
import fcntl
import os

held = 0
try:
    while True:
        _, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2**20)
        except OSError:
            pass
        try:
            while True:
                held += os.write(writer, bytes(65536))
        except BlockingIOError:
            pass
except OSError:
    pass
print("contained" if held <= 64 * 2**20 else "ESCAPED", held)
