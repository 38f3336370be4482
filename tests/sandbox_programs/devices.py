# Of devices there are null, zero, full and random.
# ends: exit 0
import os
import stat

from prelude import attempt

for name in ("mem", "kmem", "kmsg", "vda", "sda", "tty", "fuse", "kvm", "net/tun", "shm/x", "ptmx", "pts/0"):
    attempt(f"/dev/{name}", lambda name=name: open(f"/dev/{name}", "rb").read(1))
attempt("character device", lambda: os.mknod("/tmp/mem", stat.S_IFCHR | 0o666, os.makedev(1, 1)))
attempt("block device", lambda: os.mknod("/tmp/disk", stat.S_IFBLK | 0o666, os.makedev(254, 0)))
if sorted(os.listdir("/dev")) != ["full", "null", "random", "shm", "urandom", "zero"]:
    print("ESCAPED", os.listdir("/dev"))
