"""The large part of mHC on the GPU: what reads and writes streams, each element as few times as it can.

Results that the sampler and the trainer share (`project`, `site`, `post`) are either element by element or one sum
along the channels in an order that only the number of channels decides; the gradients use tensor cores freely.

fp32 numbers meet bf16 streams in a tensor core as the sum of two or three bf16 parts: 16 or 24 bits of them.
"""
# mypy: allow-incomplete-defs, allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from posttrain.kernels.mhc.triton_site import sigmoid, sum_pieces, weigh


@triton.jit
def product(a, b, sums, WIDEN: tl.constexpr):
    """`sums + a · b`; the interpreter cannot multiply bf16, so operands are widened there."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def product_by_parts(narrow, wide, sums, PARTS: tl.constexpr, WIDEN: tl.constexpr):
    """`sums + narrow · wide`, where `wide` is fp32 whatever `narrow` is."""
    if narrow.dtype == tl.float32:
        sums = product(narrow, wide, sums, WIDEN)
    else:
        for _ in tl.static_range(PARTS):
            part = wide.to(narrow.dtype)
            sums = product(narrow, part, sums, WIDEN)
            wide = wide - part.to(tl.float32)
    return sums


@triton.jit
def parts_product(wide, narrow, sums, PARTS: tl.constexpr, WIDEN: tl.constexpr):
    """`sums + wide · narrow`, where `wide` is fp32 whatever `narrow` is."""
    if narrow.dtype == tl.float32:
        sums = product(wide, narrow, sums, WIDEN)
    else:
        for _ in tl.static_range(PARTS):
            part = wide.to(narrow.dtype)
            sums = product(part, narrow, sums, WIDEN)
            wide = wide - part.to(tl.float32)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    streams,
    fn,
    partials,
    tokens,
    padded,
    CHANNELS: tl.constexpr,
    PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One piece of the channels: `partials[piece, m, t] = Σ_c streams[t, c] · fn[m, c]`; squares in row `WIDTH`.

    A piece is the sum of its units, each of them summed from zero: whoever adds up units that came as pieces of
    their own gets the same bits.
    """
    piece = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.arange(0, P)
    channel = piece * PIECE + tl.arange(0, BLOCK_C)
    stream_at = streams + token[:, None].to(tl.int64) * CHANNELS + channel[None, :]
    fn_at = fn + row[:, None] * CHANNELS + channel[None, :]
    sums = tl.zeros([BLOCK_T, P], tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_C // 8], tl.float32)
    sums_before = tl.zeros([BLOCK_T, P], tl.float32)
    squares_before = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, PIECE, BLOCK_C):
        inside = (channel + start < CHANNELS)[None, :]
        x = tl.load(stream_at + start, mask=(token < tokens)[:, None] & inside, other=0.0)
        weight = tl.load(fn_at + start, mask=(row < WIDTH)[:, None] & inside, other=0.0)
        sums = product_by_parts(x, tl.trans(weight), sums, 3, WIDEN)
        wide = x.to(tl.float32)
        squares += tl.sum(tl.reshape(wide * wide, [BLOCK_T, BLOCK_C // 8, 8]), 2)
        if UNIT < PIECE and (start + BLOCK_C) % UNIT == 0:
            sums_before += sums
            squares_before += tl.sum(squares, 1)
            sums = tl.zeros([BLOCK_T, P], tl.float32)
            squares = tl.zeros([BLOCK_T, BLOCK_C // 8], tl.float32)
    sums = tl.where(row[None, :] == WIDTH, (squares_before + tl.sum(squares, 1))[:, None], sums_before + sums)
    place = partials + (piece * P + row)[None, :] * padded + token[:, None]
    tl.store(place, sums, mask=(row <= WIDTH)[None, :])


@triton.jit(do_not_specialize=["tokens", "padded"])
def site_kernel(
    streams,
    partials,
    base,
    scale,
    mixes,
    post,
    comb,
    x,
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
    BLOCK_T: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weights of the site, by the first programs; beside them the others collapse: `x = Σ_i pre_i · stream_i`.

    Each of these computes its token's `pre` again, rather than wait for it. They begin with the last token:
    the last streams were read last, and are still in the L2 cache.
    """
    BLOCKS: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    sites = tl.cdiv(tokens, BLOCK_T)
    if program < sites:
        lanes = program * BLOCK_T + tl.arange(0, BLOCK_T)
        # fmt: off
        weigh(
            lanes, partials, base, scale, mixes, post, comb, tokens, padded, eps, norm_eps,
            CHANNELS, PIECES, UNITS, WIDTH, P, N, N2, ITERATIONS,
        )
        # fmt: on
    else:
        token = tokens - 1 - (program - sites) // BLOCKS
        channel = (program - sites) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = channel < DIM
        exists = token < tokens
        token64 = token.to(tl.int64)
        squares = sum_pieces(partials, WIDTH, token, padded, exists, PIECES, UNITS, P)
        inverse = 1.0 / tl.sqrt(squares / CHANNELS + norm_eps)
        gate = tl.load(scale)
        sums = tl.zeros([BLOCK_D], tl.float32)
        for stream in tl.static_range(N):
            part = tl.load(streams + (token64 * N + stream) * DIM + channel, mask=inside, other=0.0)
            raw = sum_pieces(partials, stream, token, padded, exists, PIECES, UNITS, P)
            sums += (sigmoid(raw * inverse * gate + tl.load(base + stream)) + eps) * part.to(tl.float32)
        tl.store(x + token64 * DIM + channel, sums.to(x.dtype.element_ty), mask=inside)


@triton.jit
def collapse_backward_kernel(
    streams, by_x, factors, padded, N: tl.constexpr, N2: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Gradient by pre, in `factors[N, T]`: inner products of a token's streams with the gradient by its input."""
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, N2)
    channel = tl.arange(0, BLOCK_D)
    sums = tl.zeros([N2, BLOCK_D], tl.float32)
    for start in range(0, DIM, BLOCK_D):
        inside = channel + start < DIM
        both = (stream < N)[:, None] & inside[None, :]
        place = streams + (token * N + stream[:, None]) * DIM + start + channel[None, :]
        part = tl.load(place, mask=both, other=0.0).to(tl.float32)
        slope = tl.load(by_x + token * DIM + start + channel, mask=inside, other=0.0).to(tl.float32)
        sums += part * slope[None, :]
    tl.store(factors + stream * padded + token, tl.sum(sums, 1), mask=stream < N)


@triton.jit(do_not_specialize=["tokens", "group_tokens"])
def streams_backward_kernel(
    streams,
    fn,
    mixes,
    by_x,
    by_mixes,
    factors,
    joined,
    by_streams,
    by_fn,
    tokens,
    padded,
    group_tokens,
    N: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    JOIN: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A block of one stream's channels over a group of tokens: gradient by streams, the group's sum for fn.

    `by_stream_i = by_mixesᵀ · fn + factor · stream_i + pre_i · by_x`, and `+ joined_i` with JOIN: the gradient by
    these streams from elsewhere;  `by_fn[group] = Σ_t by_mixes[t] · streams[t]`.
    Beside bf16 streams `by_mixes` comes in two parts; the gradient by streams, rounded to bf16 itself, takes the first.
    Streams run side by side, so that `by_x` is read from memory once; tokens go from the last to the first, because
    the last were read last before.
    """
    BLOCKS: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    kind: tl.constexpr = streams.dtype.element_ty
    stream = tl.program_id(0) % N
    local = tl.program_id(0) // N % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    inside = local < DIM
    channel = stream * DIM + local
    row = tl.arange(0, P)
    fn_at = fn + row[:, None] * (N * DIM) + channel[None, :]
    weight = tl.load(fn_at, mask=(row < WIDTH)[:, None] & inside[None, :], other=0.0)
    weight = weight.to(kind)
    sums = tl.zeros([BLOCK_D, P], tl.float32)
    first = group * group_tokens
    steps = tl.cdiv(tl.minimum(group_tokens, tokens - first), BLOCK_T)
    for step in tl.range(steps, num_stages=STAGES):  # said here, it holds for loads that meet no product too
        start = tl.multiple_of(first + (steps - 1 - step) * BLOCK_T, BLOCK_T)
        token = start + tl.arange(0, BLOCK_T)
        both = (token < tokens)[:, None] & inside[None, :]
        token64 = token[:, None].to(tl.int64)
        at = token64 * (N * DIM) + channel[None, :]
        x = tl.load(streams + at, mask=both, other=0.0)
        slope = tl.load(by_x + token64 * DIM + local[None, :], mask=both, other=0.0).to(tl.float32)
        own = tl.load(factors + N * padded + token)
        share = tl.load(mixes + (WIDTH + 1 + stream) * padded + token)
        mixes_at = by_mixes + row[None, :] * padded + token[:, None]
        high = tl.load(mixes_at, mask=(row < WIDTH)[None, :], other=0.0)
        result = product(high, weight, tl.zeros([BLOCK_T, BLOCK_D], tl.float32), WIDEN)
        sums = product(tl.trans(x), high, sums, WIDEN)
        if kind != tl.float32:
            low = tl.load(mixes_at + P * padded, mask=(row < WIDTH)[None, :], other=0.0)
            sums = product(tl.trans(x), low, sums, WIDEN)
        result += own[:, None] * x.to(tl.float32)
        # written so, `share` alone changes its layout, and `by_x` comes from shared memory as it is needed
        result = tl.fma(tl.broadcast_to(share[:, None], [BLOCK_T, BLOCK_D]), slope, result)
        if JOIN:
            result += tl.load(joined + at, mask=both, other=0.0).to(tl.float32)
        tl.store(by_streams + at, result.to(kind), mask=both)
    place = by_fn + (group * WIDTH + row)[None, :] * (N * DIM) + channel[:, None]
    tl.store(place, sums, mask=(row < WIDTH)[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["groups", "programs"])
def sums_kernel(
    by_fn_groups,
    sums_groups,
    by_fn,
    sums,
    groups,
    programs,
    SIZE: tl.constexpr,
    SUMS: tl.constexpr,
    USED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Over groups of tokens, in order: `by_fn[SIZE]`; by the program after the last of these, `sums[USED]`."""
    program = tl.program_id(0)
    if program * BLOCK < SIZE:
        at = program * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for group in range(groups):
            total += tl.load(by_fn_groups + group * SIZE + at, mask=at < SIZE, other=0.0)
        tl.store(by_fn + at, total.to(by_fn.dtype.element_ty), mask=at < SIZE)
    else:
        column = tl.arange(0, SUMS)
        row = tl.arange(0, BLOCK_P)
        both = tl.zeros([BLOCK_P, SUMS], tl.float32)
        for start in range(0, programs, BLOCK_P):
            mask = (start + row < programs)[:, None] & (column < USED)[None, :]
            both += tl.load(sums_groups + (start + row)[:, None] * SUMS + column[None, :], mask=mask, other=0.0)
        tl.store(sums + column, tl.sum(both, 0), mask=column < USED)


@triton.jit
def post_kernel(
    streams, inner, post, comb, out, N: tl.constexpr, N2: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """`out_k = post_k · inner + Σ_j comb[j, k] · stream_j`."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = tl.arange(0, N2)
    inside, valid = channel < DIM, target < N
    x = tl.load(inner + token * DIM + channel, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(post + token * N + target, mask=valid, other=0.0).to(tl.float32)
    sums = weight[:, None] * x[None, :]
    for stream in tl.static_range(N):
        weight = tl.load(comb + (token * N + stream) * N + target, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(streams + (token * N + stream) * DIM + channel, mask=inside, other=0.0).to(tl.float32)
        sums += weight[:, None] * x[None, :]
    place = out + (token * N + target[:, None]) * DIM + channel[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def post_backward_kernel(
    streams,
    inner,
    post,
    comb,
    by_out,
    by_streams,
    by_inner,
    by_post,
    by_comb,
    tokens,
    N: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """All four gradients, for as many tokens as have their streams in `ROWS` rows.

    Each is a product with the block-diagonal matrix of these tokens' `comb` or `post`, or the diagonal blocks of one.
    """
    TOGETHER: tl.constexpr = ROWS // N
    first = tl.program_id(0).to(tl.int64) * TOGETHER
    row = tl.arange(0, ROWS)
    own, stream = row // N, row % N
    exists = (own < TOGETHER) & (first + own < tokens)
    single = (row < TOGETHER) & (first + row < tokens)  # rows that stand for a token each
    same = (own[:, None] == own[None, :]) & exists[:, None] & exists[None, :]
    mine = (row[:, None] == own[None, :]) & single[:, None] & exists[None, :]
    comb_at = (first * N + row[:, None]) * N + stream[None, :]
    post_at = (first * N + row[None, :]) + tl.zeros([ROWS, ROWS], tl.int32)
    mixing = tl.load(comb + comb_at, mask=same, other=0.0).to(tl.float32)
    giving = tl.load(post + post_at, mask=mine, other=0.0).to(tl.float32)
    kind: tl.constexpr = streams.dtype.element_ty
    comb_sums = tl.zeros([ROWS, ROWS], tl.float32)
    post_sums = tl.zeros([ROWS, ROWS], tl.float32)
    channel = tl.arange(0, BLOCK_D)
    for start in range(0, DIM, BLOCK_D):
        inside = (channel + start < DIM)[None, :]
        stream_at = (first * N + row[:, None]) * DIM + start + channel[None, :]
        inner_at = (first + row[:, None]) * DIM + start + channel[None, :]
        slope = tl.load(by_out + stream_at, mask=exists[:, None] & inside, other=0.0)
        x = tl.load(streams + stream_at, mask=exists[:, None] & inside, other=0.0)
        y = tl.load(inner + inner_at, mask=single[:, None] & inside, other=0.0)
        comb_sums = product(x, tl.trans(slope), comb_sums, WIDEN)
        post_sums = product(y, tl.trans(slope), post_sums, WIDEN)
        nothing = tl.zeros([ROWS, BLOCK_D], tl.float32)
        by_x = parts_product(mixing, slope, nothing, 2, WIDEN)
        by_y = parts_product(giving, slope, nothing, 2, WIDEN)
        tl.store(by_streams + stream_at, by_x.to(kind), mask=exists[:, None] & inside)
        tl.store(by_inner + inner_at, by_y.to(kind), mask=single[:, None] & inside)
    tl.store(by_comb + comb_at, comb_sums.to(by_comb.dtype.element_ty), mask=same)
    tl.store(by_post + post_at, post_sums.to(by_post.dtype.element_ty), mask=mine)
