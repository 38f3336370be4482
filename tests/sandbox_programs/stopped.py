# A program that stops itself is ended by the clock.
# ends: wall time
import os
import signal

os.kill(os.getpid(), signal.SIGSTOP)
