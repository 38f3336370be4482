"""`compress` on the CPU: one window after another, 16 channels at once."""

from __future__ import annotations

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import choose, exp, fill, fma, get_flag, load, store

F = np.float32


@compiled
def forward(kv: int, gate: int, valid: int, entries: int, members: int, dim: int, out: int, weights: int) -> None:
    """`kv[E, M, dim]` to `out[E, dim]`, keeping `weights[E, M, dim]`; `valid` is `[E, M]`."""
    for e in range(entries):
        at = e * members * dim
        for d in range(0, dim, 16):
            top = fill(F(-np.inf))
            for m in range(members):
                if get_flag(valid, e * members + m):
                    value = load(gate, at + m * dim + d, dim - d)
                    top = choose(top, value, value, top)
            norm = fill(F(0))
            for m in range(members):
                weight = fill(F(0))
                if get_flag(valid, e * members + m):
                    weight = exp(load(gate, at + m * dim + d, dim - d) - top)
                    norm = norm + weight
                store(weights, at + m * dim + d, weight, dim - d)
            sums = fill(F(0))
            for m in range(members):
                weight = load(weights, at + m * dim + d, dim - d) / norm
                store(weights, at + m * dim + d, weight, dim - d)
                sums = fma(weight, load(kv, at + m * dim + d, dim - d), sums)
            store(out, e * dim + d, sums, dim - d)


@compiled
def backward(
    kv: int, weights: int, out: int, entries: int, members: int, dim: int, gradient: int, dkv: int, dgate: int
) -> None:
    """`dkv = weight · gradient`, `dgate = weight · gradient · (kv - out)`."""
    for e in range(entries):
        for d in range(0, dim, 16):
            middle, slope = load(out, e * dim + d, dim - d), load(gradient, e * dim + d, dim - d)
            for m in range(members):
                at = (e * members + m) * dim + d
                share = load(weights, at, dim - d) * slope
                store(dkv, at, share, dim - d)
                store(dgate, at, share * (load(kv, at, dim - d) - middle), dim - d)
