"""The mHC operations on the CPU.

What is small (the weights of a site: a few dozen numbers for each token) is computed for 16 tokens at once, one in each
lane; what is large (the streams) goes token by token, 16 channels at once. Either way a token's arithmetic is
the same whoever stands beside it.

Names: `n` streams of `dim` channels, `size = n · dim`, `mixes` the `M` projected numbers of a site: pre (n), post (n)
and comb (n²), or pre alone for the head. Tensors come as addresses; `[M, 16]` scratch arrays hold a chunk of 16 tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import choose, exp, fill, fma, get, load, put, store, total

F = np.float32


@compiled
def _dot(a: int, start_a: int, b: int, start_b: int, size: int) -> Any:
    sums = fill(F(0))
    for d in range(0, size, 16):
        sums = fma(load(a, start_a + d, size - d), load(b, start_b + d, size - d), sums)
    return total(sums)


@compiled
def _columns(source: int, start: int, lanes: int, width: int, out: Any, at: int) -> None:
    """Rows `start...` of `[T, width]` into `out[at...]`, `[width, 16]`."""
    for lane in range(lanes):
        for m in range(width):
            out[at + m * 16 + lane] = get(source, (start + lane) * width + m)


@compiled
def _rows(source: Any, at: int, start: int, lanes: int, width: int, out: int) -> None:
    """The inverse of `_columns`."""
    for lane in range(lanes):
        for m in range(width):
            put(out, (start + lane) * width + m, source[at + m * 16 + lane])


@compiled
def normalise(a: Any, at: int, out: Any, to: int, n: int, rows: bool, eps: Any, inverses: Any, inverse_at: int) -> None:
    """Divide 16 matrices `a[n · n, 16]` by their row or column sums (+ eps) into `out`, keeping the sums' inverses."""
    along, across = (16, n * 16) if rows else (n * 16, 16)
    for group in range(n):
        sums = fill(eps)
        for member in range(n):
            sums = sums + load(a, at + group * across + member * along, 16)
        inverse = F(1) / sums
        store(inverses, inverse_at + group * 16, inverse, 16)
        for member in range(n):
            place = group * across + member * along
            store(out, to + place, load(a, at + place, 16) * inverse, 16)


@compiled
def normalise_gradient(d: Any, at: int, out: Any, to: int, n: int, rows: bool, inverses: Any, inverse_at: int) -> None:
    """Gradient by the result `out` to gradient by what was normalised, in place: `(d - sum(d · out)) / sum`."""
    along, across = (16, n * 16) if rows else (n * 16, 16)
    for group in range(n):
        sums = fill(F(0))
        for member in range(n):
            place = group * across + member * along
            sums = fma(load(d, at + place, 16), load(out, to + place, 16), sums)
        inverse = load(inverses, inverse_at + group * 16, 16)
        for member in range(n):
            place = group * across + member * along
            store(d, at + place, (load(d, at + place, 16) - sums) * inverse, 16)


@compiled
def _sigmoid(x: Any) -> Any:
    return F(1) / (F(1) + exp(F(0) - x))


@compiled
def _softmax(logits: Any, at: int, n: int, eps: Any, out: Any) -> None:
    """Row-wise softmax, plus eps, of 16 matrices `logits[at...]`."""
    for row in range(0, n * n, n):
        top = load(logits, at + row * 16, 16)
        for i in range(row + 1, row + n):
            value = load(logits, at + i * 16, 16)
            top = choose(top, value, value, top)
        sums = fill(F(0))
        for i in range(row, row + n):
            value = exp(load(logits, at + i * 16, 16) - top)
            store(out, i * 16, value, 16)
            sums = sums + value
        for i in range(row, row + n):
            store(out, i * 16, load(out, i * 16, 16) / sums + eps, 16)


@compiled
def _site(
    raw: int, inverse: int, start: int, lanes: int, n: int, width: int, base: int, scale: int, eps: Any, mixes: Any,
    logits: Any,
) -> None:  # fmt: skip
    """A chunk's normed projections `mixes`, and `logits` with pre and post already through their sigmoids."""
    _columns(raw, start, lanes, width, mixes, 0)
    for m in range(width):
        mix = load(mixes, m * 16, 16) * load(inverse, start, lanes)
        store(mixes, m * 16, mix, 16)
        logit = fma(get(scale, 0 if m < n else 1 if m < 2 * n else 2), mix, fill(get(base, m)))
        if m < n:
            logit = _sigmoid(logit) + eps
        elif m < 2 * n:
            logit = F(2) * _sigmoid(logit)
        store(logits, m * 16, logit, 16)


@compiled
def pre_forward(
    streams: int, raw: int, base: int, scale: int, tokens: int, n: int, dim: int, width: int, iterations: int, eps: Any,
    norm_eps: Any, x: int, post: int, comb: int, inverse: int,
) -> None:  # fmt: skip
    """Collapsed input, post and comb of every token from its streams and their projections `raw[T, M]`.

    Keeps the norm's `inverse[T]` root.
    """
    size, pairs, eps, norm_eps = n * dim, n * n, F(eps), F(norm_eps)
    mixes, logits = np.zeros(width * 16, np.float32), np.zeros(width * 16, np.float32)
    matrices, inverses = np.empty(pairs * 16, np.float32), np.empty(n * 16, np.float32)
    for start in range(0, tokens, 16):
        lanes = min(16, tokens - start)
        for t in range(start, start + lanes):
            mean = _dot(streams, t * size, streams, t * size, size) / F(size)
            put(inverse, t, F(1) / np.sqrt(mean + norm_eps))
        _site(raw, inverse, start, lanes, n, width, base, scale, eps, mixes, logits)
        for lane in range(lanes):
            t = start + lane
            for d in range(0, dim, 16):
                sums = fill(F(0))
                for i in range(n):
                    sums = fma(logits[i * 16 + lane], load(streams, t * size + i * dim + d, dim - d), sums)
                store(x, t * dim + d, sums, dim - d)
        if width > n:
            _rows(logits, n * 16, start, lanes, n, post)
            _softmax(logits, 2 * n * 16, n, eps, matrices)
            normalise(matrices, 0, matrices, 0, n, False, eps, inverses, 0)
            for _ in range(iterations - 1):
                normalise(matrices, 0, matrices, 0, n, True, eps, inverses, 0)
                normalise(matrices, 0, matrices, 0, n, False, eps, inverses, 0)
            _rows(matrices, 0, start, lanes, pairs, comb)


@compiled
def _comb_gradient(logits: Any, n: int, iterations: int, eps: Any, stages: Any, inverses: Any, d: Any) -> None:
    """Gradient by comb to gradient by its logits, in place: recomputes every normalisation, then walks back.

    `logits` and `d` hold those of pre and post first.
    """
    at, block, steps = 2 * n * 16, n * n * 16, 2 * iterations - 1
    _softmax(logits, at, n, eps, stages)
    for step in range(steps):
        normalise(stages, step * block, stages, (step + 1) * block, n, step % 2 == 1, eps, inverses, step * n * 16)
    for step in range(steps - 1, -1, -1):
        normalise_gradient(d, at, stages, (step + 1) * block, n, step % 2 == 1, inverses, step * n * 16)
    for row in range(0, n * n, n):
        sums = fill(F(0))
        for i in range(row, row + n):
            sums = fma(load(d, at + i * 16, 16), load(stages, i * 16, 16) - eps, sums)
        for i in range(row, row + n):
            store(d, at + i * 16, (load(d, at + i * 16, 16) - sums) * (load(stages, i * 16, 16) - eps), 16)


@compiled
def _mix_gradients(
    d: Any,
    mixes: Any,
    logits: Any,
    lanes: int,
    n: int,
    width: int,
    scale: int,
    eps: Any,
    base_sums: Any,
    scale_sums: Any,
) -> Any:
    """Gradients by pre, post and comb's logits to gradients by `mixes`, in place; returns the sum of gradient · mix.

    What base and scale get is added to `[M, 16]` sums.
    """
    inner = fill(F(0))
    for m in range(width):
        dlogit, mix = load(d, m * 16, lanes), load(mixes, m * 16, lanes)
        if m < n:
            weight = load(logits, m * 16, 16) - eps
            dlogit = dlogit * weight * (F(1) - weight)
        elif m < 2 * n:
            weight = load(logits, m * 16, 16) * F(0.5)
            dlogit = F(2) * dlogit * weight * (F(1) - weight)
        store(base_sums, m * 16, load(base_sums, m * 16, 16) + dlogit, 16)
        store(scale_sums, m * 16, fma(dlogit, mix, load(scale_sums, m * 16, 16)), 16)
        dmix = dlogit * get(scale, 0 if m < n else 1 if m < 2 * n else 2)
        store(d, m * 16, dmix, 16)
        inner = fma(dmix, mix, inner)
    return inner


@compiled
def pre_backward(
    streams: int, raw: int, inverse: int, base: int, scale: int, tokens: int, n: int, dim: int, width: int,
    iterations: int, eps: Any, dx: int, dpost: int, dcomb: int, draw: int, factors: int, dbase: int, dscale: int,
) -> None:  # fmt: skip
    """Gradients by `raw`, base and scale (zeros at first); `factors[T, 1 + n]` get what `add_stream_gradient` needs."""
    size, pairs, eps = n * dim, n * n, F(eps)
    chunk = np.zeros((5, width * 16), np.float32)
    mixes, logits, d, base_sums, scale_sums = chunk[0], chunk[1], chunk[2], chunk[3], chunk[4]
    stages, inverses = np.empty(2 * iterations * pairs * 16, np.float32), np.empty(2 * iterations * n * 16, np.float32)
    for start in range(0, tokens, 16):
        lanes = min(16, tokens - start)
        _site(raw, inverse, start, lanes, n, width, base, scale, eps, mixes, logits)
        for lane in range(lanes):
            t = start + lane
            for i in range(n):
                d[i * 16 + lane] = _dot(dx, t * dim, streams, t * size + i * dim, dim)
                put(factors, t * (n + 1) + 1 + i, logits[i * 16 + lane])
        if width > n:
            _columns(dpost, start, lanes, n, d, n * 16)
            _columns(dcomb, start, lanes, pairs, d, 2 * n * 16)
            _comb_gradient(logits, n, iterations, eps, stages, inverses, d)
        inner = _mix_gradients(d, mixes, logits, lanes, n, width, scale, eps, base_sums, scale_sums)
        roots = load(inverse, start, lanes)
        for m in range(width):
            store(d, m * 16, load(d, m * 16, 16) * roots, 16)
        _rows(d, 0, start, lanes, width, draw)
        store(mixes, 0, inner * roots * roots / F(-size), 16)
        for lane in range(lanes):
            put(factors, (start + lane) * (n + 1), mixes[lane])
    for m in range(width):
        put(dbase, m, total(load(base_sums, m * 16, 16)))
        gate = 0 if m < n else 1 if m < 2 * n else 2
        put(dscale, gate, get(dscale, gate) + total(load(scale_sums, m * 16, 16)))


@compiled
def add_stream_gradient(streams: int, dx: int, factors: int, tokens: int, n: int, dim: int, out: int) -> None:
    """Add to `out`, the projection's part, the parts through the norm and through the collapse."""
    for t in range(tokens):
        row = t * (n + 1)
        for i in range(n):
            at = (t * n + i) * dim
            for d in range(0, dim, 16):
                sums = fma(get(factors, row), load(streams, at + d, dim - d), load(out, at + d, dim - d))
                sums = fma(get(factors, row + 1 + i), load(dx, t * dim + d, dim - d), sums)
                store(out, at + d, sums, dim - d)


@compiled
def post_forward(streams: int, inner: int, post: int, comb: int, tokens: int, n: int, dim: int, out: int) -> None:
    """`out_k = post_k · inner + sum_j comb[j, k] · stream_j`."""
    for t in range(tokens):
        for k in range(n):
            for d in range(0, dim, 16):
                sums = get(post, t * n + k) * load(inner, t * dim + d, dim - d)
                for j in range(n):
                    sums = fma(get(comb, (t * n + j) * n + k), load(streams, (t * n + j) * dim + d, dim - d), sums)
                store(out, (t * n + k) * dim + d, sums, dim - d)


@compiled
def post_backward(
    streams: int, inner: int, post: int, comb: int, tokens: int, n: int, dim: int, gradient: int,
    dstreams: int, dinner: int, dpost: int, dcomb: int,
) -> None:  # fmt: skip
    """All four gradients of `post_forward`."""
    for t in range(tokens):
        for d in range(0, dim, 16):
            sums = fill(F(0))
            for k in range(n):
                sums = fma(get(post, t * n + k), load(gradient, (t * n + k) * dim + d, dim - d), sums)
            store(dinner, t * dim + d, sums, dim - d)
            for j in range(n):
                sums = fill(F(0))
                for k in range(n):
                    sums = fma(get(comb, (t * n + j) * n + k), load(gradient, (t * n + k) * dim + d, dim - d), sums)
                store(dstreams, (t * n + j) * dim + d, sums, dim - d)
        for k in range(n):
            put(dpost, t * n + k, _dot(gradient, (t * n + k) * dim, inner, t * dim, dim))
            for j in range(n):
                product = _dot(streams, (t * n + j) * dim, gradient, (t * n + k) * dim, dim)
                put(dcomb, (t * n + j) * n + k, product)
