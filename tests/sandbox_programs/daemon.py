# Double fork and a session of its own do not outlive the program.
# ends: exit 0
import os
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 1024)
        time.sleep(3600)
    os._exit(0)
os.wait()
print("contained")
