# A chain of processes, each the next one's parent, ends with the program.
# ends: exit 0
import os
import time

if os.fork() == 0:
    while True:
        if os.fork() != 0:
            os._exit(0)
        time.sleep(0.001)
time.sleep(0.3)
print("contained", flush=True)
os._exit(0)
