# Three descriptors, none of them the jail's.
# ends: exit 0
import os

found = []
for number in range(3, 4096):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
print("ESCAPED" if found else "contained", found)
