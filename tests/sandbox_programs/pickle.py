# Code in a pickle is code in the jail.
# ends: exit 0
import os
import pickle

from prelude import attempt, facts


class Reader:
    def __reduce__(self):
        return (open, (facts["secret"],))


class Writer:
    def __reduce__(self):
        return (os.mkdir, (facts["open"] + "/hostile",))


attempt("read", lambda: pickle.loads(pickle.dumps(Reader())))
attempt("write", lambda: pickle.loads(pickle.dumps(Writer())))
