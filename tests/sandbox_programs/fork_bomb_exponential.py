# A bomb that never stops is over when its first process is, or at the limit of time.
# ends: any
import os

while True:
    try:
        os.fork()
    except OSError:
        pass
