# The same for standard error.
# ends: output
import sys

while True:
    sys.stderr.write("x" * 65536)
