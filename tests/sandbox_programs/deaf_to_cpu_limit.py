# A handler for SIGXCPU does not help.
# ends: cpu time
import signal

signal.signal(signal.SIGXCPU, signal.SIG_IGN)
while True:
    pass
