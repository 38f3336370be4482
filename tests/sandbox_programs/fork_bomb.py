# Processes are few: forks fail, and all are gone in the end.
# ends: any
import os
import time

children = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        children += 1
    except OSError:
        break
print("ESCAPED" if children > 20 else "contained", children)
