# Kernel memory in connected pairs is bounded by their number and size.
# ends: exit 0
import socket

held = 0
kept = []
try:
    while True:
        pair = socket.socketpair()
        kept += pair
        for end in pair:
            end.setblocking(False)
            try:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**30)
            except OSError:
                pass
            try:
                while True:
                    held += end.send(bytes(65536))
            except BlockingIOError:
                pass
except OSError:
    pass
print("contained" if held <= 32 * 2**20 else "ESCAPED", held)
