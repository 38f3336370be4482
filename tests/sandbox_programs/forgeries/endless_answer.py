# An answer without end is no answer.
import os


def f(x):
    while True:
        os.write(4, b"[" * 65536)
