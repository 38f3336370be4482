# What a small input unfolds to is limited as well.
# ends: exit 0
import zlib

from prelude import attempt

packer = zlib.compressobj(1)
bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
attempt("decompress 300 MiB", lambda: len(zlib.decompress(bomb)))
