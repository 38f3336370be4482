# An exit code of 0 is no verdict.
import sys

sys.exit(0)
