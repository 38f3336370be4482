# Only /tmp can be written.
# ends: exit 0
import os
import sys

from prelude import attempt, facts

places = ["/", "/program", "/usr", "/usr/lib", "/dev", "/proc", sys.prefix, os.path.dirname(os.__file__), facts["open"]]
for place in places:
    attempt(f"write in {place}", lambda place=place: open(f"{place}/hostile", "w"))
    attempt(f"directory in {place}", lambda place=place: os.mkdir(f"{place}/hostile"))
attempt("overwrite a module", lambda: open(os.__file__, "a"))
attempt("overwrite the interpreter", lambda: open(sys.executable, "r+b"))
