# What is done to an argument reaches that argument and nothing else.


def f(x):
    if isinstance(x, list):
        x.clear()
    return 0
