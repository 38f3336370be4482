# Exceptions that end an interpreter end the program's only.


def f(x):
    raise (KeyboardInterrupt, SystemExit, GeneratorExit)[x % 3]
