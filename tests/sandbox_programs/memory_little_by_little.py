# Small requests fail in the end.
# ends: exit 0
kept = []
try:
    while len(kept) < 2000:
        kept.append(b"x" * 2**20)
except MemoryError:
    kept = len(kept)
print("contained" if isinstance(kept, int) and kept < 256 else "ESCAPED")
