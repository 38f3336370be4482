"""`rms_norm` on the CPU, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import fill, fma, get, load, put, store, total

F = np.float32


@compiled
def forward(x: int, weight: int, rows: int, dim: int, eps: Any, out: int, inverse: int) -> None:
    """`x[N, dim]` to `out`, keeping each row's `inverse[N]` root if asked to; no weight (address 0) means ones."""
    eps = F(eps)
    for row in range(rows):
        at = row * dim
        sums = fill(F(0))
        for d in range(0, dim, 16):
            value = load(x, at + d, dim - d)
            sums = fma(value, value, sums)
        scale = F(1) / np.sqrt(total(sums) / F(dim) + eps)
        if inverse != 0:
            put(inverse, row, scale)
        for d in range(0, dim, 16):
            value = load(x, at + d, dim - d) * scale
            if weight != 0:
                value = value * load(weight, d, dim - d)
            store(out, at + d, value, dim - d)


@compiled
def backward(x: int, weight: int, inverse: int, rows: int, dim: int, gradient: int, dx: int, dweight: int) -> None:
    """Gradient by `x`; that by the weight is added up row after row."""
    for row in range(rows):
        at = row * dim
        scale = get(inverse, row)
        sums = fill(F(0))
        for d in range(0, dim, 16):
            normed, value = load(x, at + d, dim - d) * scale, load(gradient, at + d, dim - d)
            if weight != 0:
                store(dweight, d, fma(value, normed, load(dweight, d, dim - d)), dim - d)
                value = value * load(weight, d, dim - d)
            store(dx, at + d, value, dim - d)
            sums = fma(value, normed, sums)
        mean = total(sums) / F(dim)
        for d in range(0, dim, 16):
            normed = load(x, at + d, dim - d) * scale
            store(dx, at + d, (load(dx, at + d, dim - d) - normed * mean) * scale, dim - d)
