# Every process id there may be.
# ends: exit 0
import os
import signal

own = {os.getpid(), os.getppid(), 1}
killed = []
for number in (*range(2, 40_000), *range(1, 100)):
    if number not in own:
        try:
            os.kill(number, signal.SIGKILL)
            killed.append(number)
        except OSError:
            pass
print("ESCAPED" if killed else "contained", killed)
