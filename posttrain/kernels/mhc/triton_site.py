"""The small part of a mHC site on the GPU: a few dozen numbers for each token, Sinkhorn among them.

Everything is stored with tokens last, and a program has one token in each thread: a token's `n · n` matrix lies in one
thread's registers, and its row and column sums are that thread's own additions. Streams never come here.
For this layout the compiler must not know that rows are aligned (`do_not_specialize`): it would give four tokens to a
thread, and every sum to four threads.

Names: `mixes[WIDTH + 1 + N, T]` are the sums of channel · weight for the `WIDTH` rows of fn, then in row `WIDTH` the
sum of squares, then the weights `pre`; `N` streams, padded to `N2`; `padded` is the number of tokens that a row of a
buffer has room for.
"""
# mypy: allow-incomplete-defs, allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sum_pieces(partials, row, token, padded, mask, PIECES: tl.constexpr, UNITS: tl.constexpr, P: tl.constexpr):
    """One row (or an array of rows) of the partial sums, added up from the first piece of channels to the last.

    Where `project` left a piece as `UNITS` sums, these are added up first, as it does itself elsewhere. Arrays take one
    piece after the other, for fewer registers; single rows come all at once.
    """
    sums = sum_units(partials, 0, row, token, padded, mask, UNITS, P)
    if len(token.shape) > 0:
        for piece in range(1, PIECES):
            sums += sum_units(partials, piece * UNITS, row, token, padded, mask, UNITS, P)
    else:
        for piece in tl.static_range(1, PIECES):
            sums += sum_units(partials, piece * UNITS, row, token, padded, mask, UNITS, P)
    return sums


@triton.jit
def sum_units(partials, first, row, token, padded, mask, UNITS: tl.constexpr, P: tl.constexpr):
    sums = tl.load(partials + (first * P + row) * padded + token, mask=mask, other=0.0)
    for unit in tl.static_range(1, UNITS):
        sums += tl.load(partials + ((first + unit) * P + row) * padded + token, mask=mask, other=0.0)
    return sums


@triton.jit
def over_rows(matrix, eps):
    """Inverse row sums `[N2, 1, T]` of matrices `[N2, N2, T]`."""
    return 1.0 / (tl.expand_dims(tl.sum(matrix, 1), 1) + eps)


@triton.jit
def over_columns(matrix, eps):
    """Inverse column sums `[1, N2, T]`."""
    return 1.0 / (tl.expand_dims(tl.sum(matrix, 0), 0) + eps)


@triton.jit
def row_softmax(logits, valid):
    """Softmax of the rows; zero where there is no entry."""
    logits = tl.where(valid, logits, -1e30)
    powers = tl.exp(logits - tl.expand_dims(tl.max(logits, 1), 1))
    return tl.where(valid, powers / tl.expand_dims(tl.sum(powers, 1), 1), 0.0)


@triton.jit
def rows_and_columns(matrix, pairs, eps):
    """Divide by row sums, then by column sums, `pairs` times."""
    for _ in range(pairs):
        matrix = matrix * over_rows(matrix, eps)
        matrix = matrix * over_columns(matrix, eps)
    return matrix


@triton.jit
def put_parts(parts, row, token, padded, value, mask, P: tl.constexpr, PARTS: tl.constexpr):
    """Store fp32 numbers in rows of `parts[PARTS, P, T]`, as numbers of its dtype that add up to them."""
    for part in tl.static_range(PARTS):
        rounded = value.to(parts.dtype.element_ty)
        tl.store(parts + (part * P + row) * padded + token, rounded, mask=mask)
        value -= rounded.to(tl.float32)


@triton.jit
def softmax_gradient(softmax, gradient):
    return softmax * (gradient - tl.expand_dims(tl.sum(gradient * softmax, 1), 1))


@triton.jit
def sinkhorn_gradient(softmax, valid, gradient, eps, ITERATIONS: tl.constexpr, SEGMENT: tl.constexpr):
    """Gradient by the doubly stochastic matrices to gradient by the softmax they came from.

    Walks back from the last pair of normalisations. Each needs its own result, which is computed again: `SEGMENT` pairs
    at a time from one kept matrix, so that registers hold three matrices and `ITERATIONS` pairs cost about
    `ITERATIONS · (ITERATIONS / SEGMENT + SEGMENT) / 2`.
    """
    begin = tl.where(valid, softmax + eps, 0.0)
    first_inverse = over_columns(begin, eps)
    first = begin * first_inverse
    SEGMENTS: tl.constexpr = (ITERATIONS - 1 + SEGMENT - 1) // SEGMENT
    for segment in range(SEGMENTS):
        done = (SEGMENTS - 1 - segment) * SEGMENT
        base = rows_and_columns(first, done, eps)
        for step in range(SEGMENT):
            pair = SEGMENT - 1 - step  # of this segment
            before = rows_and_columns(base, pair, eps)
            row_inverse = over_rows(before, eps)
            rows = before * row_inverse
            column_inverse = over_columns(rows, eps)
            columns = rows * column_inverse
            by_rows = (gradient - tl.expand_dims(tl.sum(gradient * columns, 0), 0)) * column_inverse
            by_before = (by_rows - tl.expand_dims(tl.sum(by_rows * rows, 1), 1)) * row_inverse
            by_before = tl.where(valid, by_before, 0.0)  # an empty row would grow by 1 / eps each time
            gradient = tl.where(done + pair < ITERATIONS - 1, by_before, gradient)
    return (gradient - tl.expand_dims(tl.sum(gradient * first, 0), 0)) * first_inverse


@triton.jit
def weigh(
    token,
    partials,
    base,
    scale,
    mixes,
    post,
    comb,
    tokens,
    padded,
    eps,
    norm_eps,
    CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """From partial sums: `mixes`, and unless this is the head `post[T, N]`, `comb[T, N, N]`, for these tokens.

    Tokens beyond the last get mixes of zero.
    """
    stream = tl.arange(0, N2)
    valid, at = (stream < N)[:, None], stream[:, None]
    exists = valid & (token < tokens)[None, :]
    squares = sum_pieces(partials, WIDTH, token, padded, token < tokens, PIECES, UNITS, P)
    tl.store(mixes + WIDTH * padded + token, squares)
    inverse = 1.0 / tl.sqrt(squares / CHANNELS + norm_eps)

    raw = sum_pieces(partials, at, token[None, :], padded, exists, PIECES, UNITS, P)
    tl.store(mixes + at * padded + token[None, :], raw, mask=valid)
    base_pre = tl.load(base + stream, mask=stream < N, other=0.0)
    weights = sigmoid(raw * inverse[None, :] * tl.load(scale) + base_pre[:, None]) + eps
    tl.store(mixes + (WIDTH + 1 + at) * padded + token[None, :], weights, mask=valid)
    if WIDTH > N:
        raw = sum_pieces(partials, N + at, token[None, :], padded, exists, PIECES, UNITS, P)
        tl.store(mixes + (N + at) * padded + token[None, :], raw, mask=valid)
        base_post = tl.load(base + N + stream, mask=stream < N, other=0.0)
        weights = 2.0 * sigmoid(raw * inverse[None, :] * tl.load(scale + 1) + base_post[:, None])
        tl.store(post + token[None, :].to(tl.int64) * N + at, weights, mask=exists)

        both = (stream < N)[:, None] & (stream < N)[None, :]
        cell = stream[:, None] * N + stream[None, :]
        base_comb = tl.load(base + 2 * N + cell, mask=both, other=0.0)
        valid3, cell3 = tl.expand_dims(both, 2), tl.expand_dims(cell, 2)
        token3 = tl.expand_dims(tl.expand_dims(token, 0), 0)
        raw = sum_pieces(partials, 2 * N + cell3, token3, padded, valid3 & (token3 < tokens), PIECES, UNITS, P)
        tl.store(mixes + (2 * N + cell3) * padded + token3, raw, mask=valid3)
        normed = raw * tl.expand_dims(tl.expand_dims(inverse, 0), 0)
        softmax = row_softmax(normed * tl.load(scale + 2) + tl.expand_dims(base_comb, 2), valid3)
        begin = tl.where(valid3, softmax + eps, 0.0)
        matrix = rows_and_columns(begin * over_columns(begin, eps), ITERATIONS - 1, eps)
        tl.store(comb + token3.to(tl.int64) * (N * N) + cell3, matrix, mask=valid3 & (token3 < tokens))


@triton.jit(do_not_specialize=["tokens", "padded"])
def site_backward_kernel(
    mixes,
    base,
    scale,
    factors,
    by_post,
    by_comb,
    by_mixes,
    sums,
    tokens,
    padded,
    eps,
    norm_eps,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients by pre, `post[T, N]`, `comb[T, N, N]` to `by_mixes[PARTS, P, T]`.

    `factors[N + 1, T]` come with the gradient by pre, and get in row `N` the factor of a token's streams in their own
    gradient, through the norm. `sums[programs, SUMS]` get what these tokens give to base, then to scale.
    """
    program = tl.program_id(0)
    token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    stream = tl.arange(0, N2)
    valid, at = (stream < N)[:, None], stream[:, None]
    exists = valid & (token < tokens)[None, :]
    squares = tl.load(mixes + WIDTH * padded + token)
    inverse = tl.where(token < tokens, 1.0 / tl.sqrt(squares / CHANNELS + norm_eps), 0.0)

    gate = tl.load(scale)
    mix = tl.load(mixes + at * padded + token[None, :], mask=valid, other=0.0) * inverse[None, :]
    base_pre = tl.load(base + stream, mask=stream < N, other=0.0)
    weight = sigmoid(mix * gate + base_pre[:, None])
    slope = tl.load(factors + at * padded + token[None, :], mask=exists, other=0.0) * weight * (1.0 - weight)
    tl.store(sums + program * SUMS + stream, tl.sum(slope, 1), mask=stream < N)
    tl.store(sums + program * SUMS + WIDTH, tl.sum(tl.sum(slope * mix, 1), 0))
    put_parts(by_mixes, at, token[None, :], padded, slope * gate * inverse[None, :], valid, P, PARTS)
    inner = tl.sum(slope * mix * gate, 0)
    if WIDTH > N:
        gate = tl.load(scale + 1)
        mix = tl.load(mixes + (N + at) * padded + token[None, :], mask=valid, other=0.0) * inverse[None, :]
        base_post = tl.load(base + N + stream, mask=stream < N, other=0.0)
        weight = sigmoid(mix * gate + base_post[:, None])
        slope = tl.load(by_post + token[None, :].to(tl.int64) * N + at, mask=exists, other=0.0)
        slope = 2.0 * slope * weight * (1.0 - weight)
        tl.store(sums + program * SUMS + N + stream, tl.sum(slope, 1), mask=stream < N)
        tl.store(sums + program * SUMS + WIDTH + 1, tl.sum(tl.sum(slope * mix, 1), 0))
        put_parts(by_mixes, N + at, token[None, :], padded, slope * gate * inverse[None, :], valid, P, PARTS)
        inner += tl.sum(slope * mix * gate, 0)

        gate = tl.load(scale + 2)
        both = (stream < N)[:, None] & (stream < N)[None, :]
        cell = stream[:, None] * N + stream[None, :]
        base_comb = tl.load(base + 2 * N + cell, mask=both, other=0.0)
        valid3, cell3 = tl.expand_dims(both, 2), tl.expand_dims(cell, 2)
        token3 = tl.expand_dims(tl.expand_dims(token, 0), 0)
        inverse3 = tl.expand_dims(tl.expand_dims(inverse, 0), 0)
        mix3 = tl.load(mixes + (2 * N + cell3) * padded + token3, mask=valid3, other=0.0) * inverse3
        softmax = row_softmax(mix3 * gate + tl.expand_dims(base_comb, 2), valid3)
        place = by_comb + token3.to(tl.int64) * (N * N) + cell3
        slope3 = tl.load(place, mask=valid3 & (token3 < tokens), other=0.0)
        slope3 = sinkhorn_gradient(softmax, valid3, slope3, eps, ITERATIONS, SEGMENT)
        slope3 = softmax_gradient(softmax, slope3)
        tl.store(sums + program * SUMS + 2 * N + cell, tl.sum(slope3, 2), mask=both)
        tl.store(sums + program * SUMS + WIDTH + 2, tl.sum(tl.sum(tl.sum(slope3 * mix3, 2), 1), 0))
        put_parts(by_mixes, 2 * N + cell3, token3, padded, slope3 * gate * inverse3, valid3, P, PARTS)
        inner += tl.sum(tl.sum(slope3 * mix3 * gate, 1), 0)
    tl.store(factors + N * padded + token, -inner * inverse * inverse / CHANNELS)
