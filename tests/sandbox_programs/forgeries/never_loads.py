# So does a module that never ends.
while True:
    pass
