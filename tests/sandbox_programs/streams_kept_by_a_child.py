# A child that keeps the streams open keeps nobody waiting either.
# ends: exit 0
import os
import time

if os.fork() == 0:
    os.setsid()
    time.sleep(3600)
print("contained", flush=True)
