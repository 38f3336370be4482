# The same in C.
# ends: exit 0
nested = []
for _ in range(10**6):
    nested = [nested]
try:
    print("ESC" + "APED", len(repr(nested)))
except RecursionError:
    pass
del nested  # freeing it is as deep
print("contained")
