# Neither is one that would take the reader's stack.
import os

os.write(4, b"[" * 100_000 + b"]" * 100_000 + b"\n")


def f(x):
    nested = []
    for _ in range(100_000):
        nested = [nested]
    return nested
