# Arithmetic that would take hours and all memory is ended.
# ends: any
print("ESCAPED", (7 ** (10**9)).bit_length())
