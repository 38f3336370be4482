# Output is cut, and the program with it.
# ends: output
while True:
    print("x" * 65536)
