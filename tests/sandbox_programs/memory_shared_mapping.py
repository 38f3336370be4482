# Shared anonymous memory counts like any other.
# ends: memory
import mmap
import os
import time

for _ in range(6):
    if os.fork() == 0:
        area = mmap.mmap(-1, 80 * 2**20)
        for position in range(0, len(area), 4096):
            area[position] = 1
        time.sleep(30)
time.sleep(30)
