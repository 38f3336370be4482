# Neither raw packets nor the kernel's own families.
# ends: exit 0
import socket

from prelude import attempt

for family, kind in ((2, 3), (16, 3), (17, 3), (38, 5), (40, 1), (31, 3), (29, 3), (21, 5)):
    attempt(f"family {family}", lambda family=family, kind=kind: socket.socket(family, kind))
