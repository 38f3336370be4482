"""Sparse attention on the GPU, backward, first pass for narrow dtypes: one program takes a token with up to 64 heads.

The queries and the gradients by the results of all heads stay in shared memory, as rows that alternate: `q` of a head,
then `g` of that head. One product of a block's entries with them gives scores and gradients by weights, and those
of one head lie in the same thread. The rows that the block adds to its entries' gradients are one product too, of
gradients by scores and weights that alternate likewise. The token's gradient by queries stays in registers.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from posttrain.kernels.attention.triton_parts import UNITS, places, product, read_piece


@triton.jit
def _add(parts, part_at, inside, c, pairs, heads, DIM: tl.constexpr, PIECE: tl.constexpr, WIDEN: tl.constexpr):
    """Writes the same channels of the rows that the block adds to its entries' gradients."""
    part = product(pairs, heads, tl.zeros([pairs.shape[0], PIECE], tl.float32), WIDEN)
    there = inside[:, None] & (tl.arange(0, PIECE) < DIM - c)[None, :]
    tl.store(part_at + c, part.to(parts.dtype.element_ty), mask=there)


@triton.jit
def _alternating(q, gradient, t, group, d, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr):
    """Channels `d` of `q` and `g` of each head, rows in turn."""
    r = tl.arange(0, 2 * TILE)
    h = group * TILE + r // 2
    at = (t * HEADS + h.to(tl.int64))[:, None] * DIM + d[None, :]
    row_at = tl.where((r % 2 == 0)[:, None], q + at, gradient + at)
    return tl.load(row_at, mask=(h < HEADS)[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _deltas(out, gradient, t, h, d, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Each head's product of its result with its gradient, over channels `d`."""
    at = t * HEADS * DIM + h[:, None] * DIM + d[None, :]
    real = (h < HEADS)[:, None] & (d < DIM)[None, :]
    ours = tl.load(out + at, mask=real, other=0.0).to(tl.float32)
    return tl.sum(ours * tl.load(gradient + at, mask=real, other=0.0).to(tl.float32), 1)


@triton.jit
def _slopes(both, inside, norm, less, scale, dtype: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Gradients by unscaled scores of a block `[BLOCK, TILE]`; they and the weights in turn `[BLOCK, 2 · TILE]`."""
    both = tl.reshape(both, [BLOCK, TILE, 2])
    even = (tl.arange(0, 2) == 0)[None, None, :]
    # A sum of two, one of them zero: unlike `tl.split` and `tl.join` it leaves every number in its thread.
    scores = tl.sum(tl.where(even, both, 0.0), 2)
    dweights = tl.sum(tl.where(even, 0.0, both), 2)
    weights = tl.where(inside[:, None], tl.exp2(scores * (scale * UNITS) - norm[None, :]), 0.0)
    slope = weights * (dweights - less[None, :]) * scale
    pairs = tl.where(even, slope[:, :, None], weights[:, :, None])
    return slope.to(dtype), tl.reshape(pairs, [BLOCK, 2 * TILE]).to(dtype)


@triton.jit(do_not_specialize=["columns_a", "columns"])
def tokens_kernel(
    q,
    gradient,
    out,
    store_a,
    store_b,
    rows,
    counts,
    lse,
    delta,
    dq,
    parts,
    stride_a,
    stride_b,
    columns_a,
    columns,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    FOR_STORES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`delta[T, H]`, `dq[T, H, D]` and `parts[T, K, TILES, D]`; axis 0 of the grid is tokens, 1 head tiles."""
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    dtype: tl.constexpr = q.dtype.element_ty
    d = tl.arange(0, PIECE)
    h = group * TILE + tl.arange(0, TILE)
    less = tl.zeros([TILE], tl.float32)
    for c in tl.static_range(0, 4 * PIECE, PIECE):
        less += _deltas(out, gradient, t, h, c + d, HEADS, DIM)
    tl.store(delta + t * HEADS + h, less, mask=h < HEADS)
    tl.debug_barrier()  # what other threads stored is read back, in the layout of the products
    less = tl.load(delta + t * HEADS + h, mask=h < HEADS, other=0.0)
    norm = tl.load(lse + t * HEADS + h, mask=h < HEADS, other=0.0)
    heads_0 = _alternating(q, gradient, t, group, d, HEADS, DIM, TILE)
    heads_1 = _alternating(q, gradient, t, group, PIECE + d, HEADS, DIM, TILE)
    heads_2 = _alternating(q, gradient, t, group, 2 * PIECE + d, HEADS, DIM, TILE)
    heads_3 = _alternating(q, gradient, t, group, 3 * PIECE + d, HEADS, DIM, TILE)
    count_a = tl.maximum(tl.load(counts + 2 * t), 0)
    start_b = tl.cdiv(count_a, BLOCK) * BLOCK
    end = start_b + tl.maximum(tl.load(counts + 2 * t + 1), 0)
    rows += t * columns
    parts += (t * columns * TILES + group) * DIM
    dq_0 = tl.zeros([TILE, PIECE], tl.float32)
    dq_1 = tl.zeros([TILE, PIECE], tl.float32)
    dq_2 = tl.zeros([TILE, PIECE], tl.float32)
    dq_3 = tl.zeros([TILE, PIECE], tl.float32)
    for start in tl.range(0, end, BLOCK, num_stages=1):
        column, inside = places(start, count_a, start_b, end, columns_a, BLOCK)
        row = tl.load(rows + column, mask=inside, other=0)
        store = tl.where(start < start_b, store_a, store_b)
        stride = tl.where(start < start_b, stride_a, stride_b)
        entry_at = store + row.to(tl.int64)[:, None] * stride + d[None, :]
        entries_0 = read_piece(entry_at, inside, 0, DIM, PIECE, dtype)
        entries_1 = read_piece(entry_at, inside, PIECE, DIM, PIECE, dtype)
        entries_2 = read_piece(entry_at, inside, 2 * PIECE, DIM, PIECE, dtype)
        entries_3 = read_piece(entry_at, inside, 3 * PIECE, DIM, PIECE, dtype)
        # Branches that are always taken: without them Triton has all warps compute all of a product that feeds another
        # (see the forward kernel), and it joins branches that have the same condition.
        both = tl.zeros([BLOCK, 2 * TILE], tl.float32)
        slope = tl.zeros([BLOCK, TILE], dtype)
        pairs = tl.zeros([BLOCK, 2 * TILE], dtype)
        if start < end:
            both = product(entries_0, tl.trans(heads_0), both, WIDEN)
        if start < end + 1:  # noqa: SIM102 - the condition inside is known when Triton compiles
            if PIECE < DIM:
                both = product(entries_1, tl.trans(heads_1), both, WIDEN)
        if start < end + 2:  # noqa: SIM102 - the condition inside is known when Triton compiles
            if 2 * PIECE < DIM:
                both = product(entries_2, tl.trans(heads_2), both, WIDEN)
        if start < end + 3:
            if 3 * PIECE < DIM:
                both = product(entries_3, tl.trans(heads_3), both, WIDEN)
            slope, pairs = _slopes(both, inside, norm, less, scale, dtype, BLOCK, TILE)
        dq_0 = product(tl.trans(slope), entries_0, dq_0, WIDEN)
        if PIECE < DIM:
            dq_1 = product(tl.trans(slope), entries_1, dq_1, WIDEN)
        if 2 * PIECE < DIM:
            dq_2 = product(tl.trans(slope), entries_2, dq_2, WIDEN)
        if 3 * PIECE < DIM:
            dq_3 = product(tl.trans(slope), entries_3, dq_3, WIDEN)
        if FOR_STORES:
            part_at = parts + column[:, None] * (TILES * DIM) + d[None, :]
            _add(parts, part_at, inside, 0, pairs, heads_0, DIM, PIECE, WIDEN)
            if PIECE < DIM:
                _add(parts, part_at, inside, PIECE, pairs, heads_1, DIM, PIECE, WIDEN)
            if 2 * PIECE < DIM:
                _add(parts, part_at, inside, 2 * PIECE, pairs, heads_2, DIM, PIECE, WIDEN)
            if 3 * PIECE < DIM:
                _add(parts, part_at, inside, 3 * PIECE, pairs, heads_3, DIM, PIECE, WIDEN)
    at = dq + t * HEADS * DIM + h[:, None] * DIM + d[None, :]
    real = (h < HEADS)[:, None]
    tl.store(at, dq_0.to(dtype), mask=real & (d < DIM)[None, :])
    tl.store(at + PIECE, dq_1.to(dtype), mask=real & (d < DIM - PIECE)[None, :])
    tl.store(at + 2 * PIECE, dq_2.to(dtype), mask=real & (d < DIM - 2 * PIECE)[None, :])
    tl.store(at + 3 * PIECE, dq_3.to(dtype), mask=real & (d < DIM - 3 * PIECE)[None, :])
