# Neither can directories be made without end.
# ends: exit 0
import os

made = 0
try:
    os.chdir("/tmp")
    while made < 5000:
        os.mkdir("d")
        os.chdir("d")
        made += 1
except OSError as error:
    print(error)
print("contained" if made < 2000 else "ESCAPED", made)
