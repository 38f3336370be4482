# The caller's environment is not the program's.
# ends: exit 0
import os

print("ESCAPED" if "secret" in str(dict(os.environ)).lower() else "contained", sorted(os.environ))
