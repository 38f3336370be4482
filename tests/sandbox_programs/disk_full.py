# The private directory is small.
# ends: exit 0
written = 0
try:
    for number in range(100):
        with open(f"/tmp/{number}", "wb", buffering=0) as file:
            for _ in range(16):
                written += file.write(bytes(2**20))
except OSError as error:
    print(error)
print("contained" if written <= 16 * 2**20 else "ESCAPED", written)
