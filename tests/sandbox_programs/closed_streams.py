# Closing all streams keeps nobody waiting.
# ends: wall time
import os
import time

os.closerange(0, 1024)
time.sleep(3600)
