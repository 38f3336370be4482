# Without a recursion limit the process dies, and nothing else.
# ends: any
import sys

sys.setrecursionlimit(10**9)


def deeper(depth):
    return deeper(depth + 1) + 1


print("ESCAPED", deeper(0))
