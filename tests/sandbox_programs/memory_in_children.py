# Children cannot multiply the limit: their sum counts.
# ends: memory
import os
import time

for _ in range(8):
    if os.fork() == 0:
        kept = bytearray(b"x") * (60 * 2**20)
        time.sleep(30)
time.sleep(30)
