"""`sparse_attention` on the CPU, one token after another: gather the entries that exist, score, weigh, add up.

Only entries that exist take part, in the order of their rows, so neither padding nor other tokens can change a bit.
Tensors come as addresses. Scratch rows are padded to whole vectors (`width` floats for `dim`), with zeros.

A source is five numbers: the address of its store, the distance between the store's rows, how many there are, the
address of the index and its columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import (
    choose,
    exp,
    fill,
    first,
    fma,
    get,
    get_integer,
    keep,
    largest,
    load,
    put,
    store,
    total,
)

F = np.float32


@compiled
def _gather(entries: Any, rows: Any, count: int, source: Any, t: int, dim: int) -> int:
    """Append the entries that row `t` of the index names to `entries` and `rows`; returns how many there are now."""
    address, stride, size, index, columns = source
    width = -(-dim // 16) * 16
    for column in range(columns):
        row = get_integer(index, t * columns + column)
        if row >= 0:
            if row >= size:
                raise IndexError("sparse_attention: an index names a row that its store does not have")
            rows[count] = row
            for d in range(0, dim, 16):
                store(entries, count * width + d, load(address, row * stride + d, dim - d), 16)
            count += 1
    return count


@compiled
def _pad_rows(source: int, start: int, count: int, dim: int, out: Any) -> None:
    width = -(-dim // 16) * 16
    for row in range(count):
        for d in range(0, dim, 16):
            store(out, row * width + d, load(source, start + row * dim + d, dim - d), 16)


@compiled
def _products(heads_HW: Any, heads: int, entries_KW: Any, count: int, width: int, out_HP: Any, pitch: int) -> None:
    """Every head's product with every entry."""
    for h in range(heads):
        for k in range(count):
            sums = fill(F(0))
            for d in range(0, width, 16):
                sums = fma(load(heads_HW, h * width + d, 16), load(entries_KW, k * width + d, 16), sums)
            out_HP[h * pitch + k] = total(sums)


@compiled
def _softmax(scores: Any, start: int, count: int, scale: Any, sink: Any, out: int, at: int) -> Any:
    """Weights of one head's scores into `out[at...]`, zeros to the last vector's end; returns the sink's weight."""
    top = fill(sink)
    for k in range(0, count, 16):
        row = keep(count - k, load(scores, start + k, 16) * scale, sink)
        top = choose(top, row, row, top)
    highest = largest(top)
    sums = fill(F(0))
    for k in range(0, count, 16):
        weights = keep(count - k, exp(load(scores, start + k, 16) * scale - highest), F(0))
        store(out, at + k, weights, 16)
        sums = sums + weights
    sink_weight = exp(fill(sink - highest))
    norm = sink_weight + total(sums)
    for k in range(0, count, 16):
        store(out, at + k, load(out, at + k, 16) / norm, 16)
    return first(sink_weight / norm)


@compiled
def forward(
    q: int, sink_H: int, scale: Any, tokens: int, heads: int, dim: int, source_a: Any, source_b: Any, out: int,
    weights: int, keep_weights: bool, sink_weights: int,
) -> None:  # fmt: skip
    """`q[T, H, D]` to `out`, and the sinks' weights `[T, H]`.

    `weights` is `[T, H, K]`, existing entries first, or scratch for one token if they are not to be kept.
    """
    pitch, width, scale = source_a[4] + source_b[4], -(-dim // 16) * 16, F(scale)
    entries, rows = np.empty(pitch * width, np.float32), np.empty(pitch, np.int64)
    heads_HW, scores = np.empty(heads * width, np.float32), np.empty(heads * pitch, np.float32)
    for t in range(tokens):
        count = _gather(entries, rows, 0, source_a, t, dim)
        count = _gather(entries, rows, count, source_b, t, dim)
        _pad_rows(q, t * heads * dim, heads, dim, heads_HW)
        _products(heads_HW, heads, entries, count, width, scores, pitch)
        for h in range(heads):
            base = (t * heads + h if keep_weights else h) * pitch
            sink_weight = _softmax(scores, h * pitch, count, scale, get(sink_H, h), weights, base)
            put(sink_weights, t * heads + h, sink_weight)
            for d in range(0, dim, 16):
                sums = fill(F(0))
                for k in range(count):
                    sums = fma(get(weights, base + k), load(entries, k * width + d, 16), sums)
                store(out, (t * heads + h) * dim + d, sums, dim - d)


@compiled
def _score_gradients(weights: int, start: int, count: int, scale: Any, dscores: Any, base: int) -> Any:
    """Gradients by weights into gradients by unscaled scores, in place; returns the sum of gradient · weight."""
    sums = fill(F(0))
    for k in range(0, count, 16):
        sums = fma(load(weights, start + k, count - k), keep(count - k, load(dscores, base + k, 16), F(0)), sums)
    delta = total(sums)
    for k in range(0, count, 16):
        gradient = load(weights, start + k, count - k) * (load(dscores, base + k, 16) - delta) * scale
        store(dscores, base + k, gradient, 16)
    return delta


@compiled
def _add_to_entries(
    dstore: int, rows: Any, start: int, end: int, dim: int, heads: int, dscores: Any, queries: Any, pitch: int,
    weights: int, base: int, gradients: Any,
) -> None:  # fmt: skip
    """Add one token's part to the gradient of the entries that it read: as keys and as values."""
    width = -(-dim // 16) * 16
    for k in range(start, end):
        for d in range(0, dim, 16):
            sums = load(dstore, rows[k] * dim + d, dim - d)
            for h in range(heads):
                sums = fma(dscores[h * pitch + k], load(queries, h * width + d, 16), sums)
                sums = fma(get(weights, base + h * pitch + k), load(gradients, h * width + d, 16), sums)
            store(dstore, rows[k] * dim + d, sums, dim - d)


@compiled
def backward(
    q: int, gradient: int, weights: int, sink_weights: int, scale: Any, tokens: int, heads: int, dim: int,
    source_a: Any, source_b: Any, dq: int, dstore_a: int, dstore_b: int, dsink_H: int,
) -> None:  # fmt: skip
    """Writes `dq` and `dsink_H`; adds to the stores' gradients, which are contiguous, token after token."""
    pitch, width, scale = source_a[4] + source_b[4], -(-dim // 16) * 16, F(scale)
    entries, rows = np.empty(pitch * width, np.float32), np.empty(pitch, np.int64)
    queries, gradients = np.empty(heads * width, np.float32), np.empty(heads * width, np.float32)
    dscores, dsinks = np.zeros(heads * pitch, np.float32), np.zeros(heads, np.float64)
    for t in range(tokens):
        base = t * heads * pitch
        count_a = _gather(entries, rows, 0, source_a, t, dim)
        count = _gather(entries, rows, count_a, source_b, t, dim)
        _pad_rows(q, t * heads * dim, heads, dim, queries)
        _pad_rows(gradient, t * heads * dim, heads, dim, gradients)
        _products(gradients, heads, entries, count, width, dscores, pitch)
        for h in range(heads):
            delta = _score_gradients(weights, base + h * pitch, count, scale, dscores, h * pitch)
            dsinks[h] -= get(sink_weights, t * heads + h) * delta
            for d in range(0, dim, 16):
                sums = fill(F(0))
                for k in range(count):
                    sums = fma(dscores[h * pitch + k], load(entries, k * width + d, 16), sums)
                store(dq, (t * heads + h) * dim + d, sums, dim - d)
        _add_to_entries(dstore_a, rows, 0, count_a, dim, heads, dscores, queries, pitch, weights, base, gradients)
        _add_to_entries(dstore_b, rows, count_a, count, dim, heads, dscores, queries, pitch, weights, base, gradients)
    for h in range(heads):
        put(dsink_H, h, F(dsinks[h]))
