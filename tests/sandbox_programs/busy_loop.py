# CPU time ends it.
# ends: cpu time
while True:
    pass
