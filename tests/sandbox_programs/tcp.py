# No connection anywhere, loopback included.
# ends: exit 0
import socket
import urllib.request

from prelude import attempt, facts

attempt("connect", lambda: socket.create_connection(("127.0.0.1", facts["port"]), timeout=2))
attempt("connect 6", lambda: socket.create_connection(("::1", facts["port"]), timeout=2))
attempt("listen", lambda: socket.create_server(("127.0.0.1", 0)))
attempt("name", lambda: socket.getaddrinfo("example.com", 80))
attempt("url", lambda: urllib.request.urlopen(f"http://127.0.0.1:{facts['port']}/", timeout=2))
