"""`index_scores` on the CPU: only candidates that exist are read."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import fill, fma, get, get_integer, load, put, store, total

F = np.float32


@compiled
def _dot(a: int, at_a: int, b: int, at_b: int, dim: int) -> Any:
    sums = fill(F(0))
    for d in range(0, dim, 16):
        sums = fma(load(a, at_a + d, dim - d), load(b, at_b + d, dim - d), sums)
    return total(sums)


@compiled
def forward(
    q: int, weights: int, tokens: int, heads: int, dim: int, keys: int, stride: int, size: int, candidates: int,
    columns: int, out: int,
) -> None:  # fmt: skip
    """`q[T, H, dim]`, `weights[T, H]` and `size` keys that stand `stride` apart to scores `[T, E]`."""
    for t in range(tokens):
        for e in range(columns):
            row = get_integer(candidates, t * columns + e)
            score = F(-np.inf)
            if row >= 0:
                if row >= size:
                    raise IndexError("index_scores: a candidate names a row that the keys do not have")
                score = F(0)
                for h in range(heads):
                    product = _dot(q, (t * heads + h) * dim, keys, row * stride, dim)
                    if not product <= 0:
                        score += get(weights, t * heads + h) * product
            put(out, t * columns + e, score)


@compiled
def backward(
    q: int, weights: int, tokens: int, heads: int, dim: int, keys: int, stride: int, candidates: int, columns: int,
    gradient: int, dq: int, dweights: int, dkeys: int,
) -> None:  # fmt: skip
    """Adds to all three gradients, token after token."""
    for t in range(tokens):
        for e in range(columns):
            row, slope = get_integer(candidates, t * columns + e), get(gradient, t * columns + e)
            if row < 0:
                continue
            for h in range(heads):
                head = t * heads + h
                at = head * dim
                product = _dot(q, at, keys, row * stride, dim)
                if product <= 0:
                    continue
                put(dweights, head, get(dweights, head) + slope * product)
                factor = slope * get(weights, head)
                for d in range(0, dim, 16):
                    key, query = load(keys, row * stride + d, dim - d), load(q, at + d, dim - d)
                    store(dq, at + d, fma(factor, key, load(dq, at + d, dim - d)), dim - d)
                    store(dkeys, row * dim + d, fma(factor, query, load(dkeys, row * dim + d, dim - d)), dim - d)
