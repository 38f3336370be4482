# Threads count as processes.
# ends: any
import threading
import time

started = 0
try:
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        started += 1
except (RuntimeError, MemoryError):
    pass
print("ESCAPED" if started > 20 else "contained", started, flush=True)
