"""`apply_rope` on the CPU."""

from __future__ import annotations

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import get, load, put, store

F = np.float32


@compiled
def rotate(x: int, rows: int, heads: int, dim: int, cos: int, sin: int, half: int, backwards: bool, out: int) -> None:
    """`x[T, heads, dim]`, `T · heads` rows, to `out`, by the angles `[T, half]` or back."""
    rest = dim - 2 * half
    sign = F(-1) if backwards else F(1)
    for row in range(rows):
        at, angle = row * dim, row // heads * half
        for d in range(0, rest, 16):
            store(out, at + d, load(x, at + d, rest - d), rest - d)
        for i in range(half):
            place = at + rest + 2 * i
            c, s = get(cos, angle + i), get(sin, angle + i) * sign
            even, odd = get(x, place), get(x, place + 1)
            put(out, place, even * c - odd * s)
            put(out, place + 1, odd * c + even * s)
