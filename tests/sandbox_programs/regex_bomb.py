# A regular expression that holds on to the interpreter is ended from outside.
# ends: cpu time
import re

re.fullmatch("(a|aa)+c", "a" * 60 + "b")
