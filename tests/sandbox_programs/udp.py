# No datagrams.
# ends: exit 0
import socket

from prelude import attempt, facts

attempt("send", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", facts["port"])))
attempt("broadcast", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("255.255.255.255", 9)))
