# Children that nobody waits for count as well.
# ends: exit 0
import os

made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os._exit(0)
        made += 1
    except OSError:
        break
print("ESCAPED" if made > 20 else "contained", made)
