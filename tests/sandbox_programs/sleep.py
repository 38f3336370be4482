# The clock ends it.
# ends: wall time
import time

time.sleep(3600)
