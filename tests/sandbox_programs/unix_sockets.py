# No Unix socket, by path or abstract. A connected pair is all.
# ends: exit 0
import socket

from prelude import attempt, facts

attempt("by path", lambda: socket.socket(socket.AF_UNIX).connect(facts["unix"]))
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\0" + facts["abstract"]))
left, right = socket.socketpair()
attempt("abstract from a pair", lambda: left.sendto(b"x", "\0" + facts["abstract"]))
datagrams, _ = socket.socketpair(type=socket.SOCK_DGRAM)
attempt("abstract from a pair of datagrams", lambda: datagrams.sendto(b"x", "\0" + facts["abstract"]))
attempt("a pair of another family", lambda: socket.socketpair(socket.AF_INET))
