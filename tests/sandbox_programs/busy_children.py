# The CPU time of all processes counts together, also of those that ended.
# ends: cpu time
import os
import time

while True:
    if os.fork() == 0:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        os._exit(0)
    os.wait()
