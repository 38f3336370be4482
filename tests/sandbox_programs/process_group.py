# Neither does a process group of its own.
# ends: exit 0
import os
import time

for _ in range(5):
    if os.fork() == 0:
        os.setpgid(0, 0)
        time.sleep(3600)
print("contained", flush=True)
os._exit(0)
