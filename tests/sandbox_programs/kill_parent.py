# The supervisor does not die, and nothing outside can be named.
# ends: exit 0
import os
import signal

from prelude import attempt, facts

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
    attempt(f"{number} to the caller", lambda number=number: os.kill(facts["caller"], number))
    attempt(f"{number} to the bystander", lambda number=number: os.kill(facts["bystander"], number))
    try:
        os.kill(os.getppid(), number)
    except OSError as error:
        print("contained", error)
print("contained: still here")
