"""Sparse attention on the GPU, forward for narrow dtypes: the next block's entries wait in registers.

The same walk as `forward_kernel`, with the channels cut in four pieces. A block's entries go to shared memory at the
start of a step; once the scores have been computed, the next block's loads are issued, and arrive while the softmax and
the products with the weights run.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from posttrain.kernels.attention.triton_parts import UNITS, places, product, read_piece


@triton.jit
def _read(stores, lists, start, DIM: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """The block of entries that begins at `start`, in four pieces of their channels; zeros where there are no more."""
    store_a, store_b, stride_a, stride_b = stores
    rows, count_a, start_b, end, columns_a = lists
    column, inside = places(start, count_a, start_b, end, columns_a, BLOCK)
    row = tl.load(rows + column, mask=inside, other=0)
    store = tl.where(start < start_b, store_a, store_b)
    stride = tl.where(start < start_b, stride_a, stride_b)
    entry_at = store + row.to(tl.int64)[:, None] * stride + tl.arange(0, PIECE)[None, :]
    return (
        read_piece(entry_at, inside, 0, DIM, PIECE, dtype),
        read_piece(entry_at, inside, PIECE, DIM, PIECE, dtype),
        read_piece(entry_at, inside, 2 * PIECE, DIM, PIECE, dtype),
        read_piece(entry_at, inside, 3 * PIECE, DIM, PIECE, dtype),
    )


@triton.jit
def _write(out_at, sums, total, real, c, DIM: tl.constexpr, PIECE: tl.constexpr):
    """Channels of the result from `c` on."""
    there = real[:, None] & (tl.arange(0, PIECE) < DIM - c)[None, :]
    tl.store(out_at + c, (sums / total[:, None]).to(out_at.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["columns_a", "columns"])
def ahead_kernel(
    q,
    store_a,
    store_b,
    rows,
    counts,
    sink,
    out,
    lse,
    stride_a,
    stride_b,
    columns_a,
    columns,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`out[T, H, D]` and `lse[T, H]` (sink included, in units of log 2); axis 0 of the grid is tokens, 1 head tiles."""
    t = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    h = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = h < HEADS
    at = t * HEADS * DIM + h[:, None] * DIM + tl.arange(0, PIECE)[None, :]
    query_0 = read_piece(q + at, real, 0, DIM, PIECE, dtype)
    query_1 = read_piece(q + at, real, PIECE, DIM, PIECE, dtype)
    query_2 = read_piece(q + at, real, 2 * PIECE, DIM, PIECE, dtype)
    query_3 = read_piece(q + at, real, 3 * PIECE, DIM, PIECE, dtype)
    top = tl.load(sink + h, mask=real, other=0.0).to(tl.float32) * UNITS
    total = tl.full([TILE], 1.0, tl.float32)
    sums_0 = tl.zeros([TILE, PIECE], tl.float32)
    sums_1 = tl.zeros([TILE, PIECE], tl.float32)
    sums_2 = tl.zeros([TILE, PIECE], tl.float32)
    sums_3 = tl.zeros([TILE, PIECE], tl.float32)
    count_a = tl.load(counts + 2 * t)
    count_b = tl.load(counts + 2 * t + 1)
    spoilt = tl.minimum(count_a, count_b) < 0
    count_a = tl.maximum(count_a, 0)
    start_b = tl.cdiv(count_a, BLOCK) * BLOCK
    end = start_b + tl.maximum(count_b, 0)
    stores = store_a, store_b, stride_a, stride_b
    lists = rows + t * columns, count_a, start_b, end, columns_a
    entries_0, entries_1, entries_2, entries_3 = _read(stores, lists, 0, DIM, PIECE, BLOCK, dtype)
    for start in tl.range(0, end, BLOCK, num_stages=1):
        inside = places(start, count_a, start_b, end, columns_a, BLOCK)[1]
        # Branches that are always taken hide one product from the next (see `HIDE_CHAIN`); Triton would join branches
        # that have the same condition.
        scores = tl.zeros([TILE, BLOCK], tl.float32)
        weights = tl.zeros([TILE, BLOCK], dtype)
        shrink = tl.full([TILE], 1.0, tl.float32)
        if start < end:
            scores = product(query_0, tl.trans(entries_0), scores, WIDEN)
        if start < end + 1:  # noqa: SIM102 - the condition inside is known when Triton compiles
            if PIECE < DIM:
                scores = product(query_1, tl.trans(entries_1), scores, WIDEN)
        if start < end + 2:  # noqa: SIM102 - the condition inside is known when Triton compiles
            if 2 * PIECE < DIM:
                scores = product(query_2, tl.trans(entries_2), scores, WIDEN)
        if start < end + 3:
            if 3 * PIECE < DIM:
                scores = product(query_3, tl.trans(entries_3), scores, WIDEN)
            scores = tl.where(inside[None, :], scores * (scale * UNITS), float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            exact = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(exact, 1)
            weights = exact.to(dtype)
            top = higher
        next_0, next_1, next_2, next_3 = _read(stores, lists, start + BLOCK, DIM, PIECE, BLOCK, dtype)
        sums_0 = product(weights, entries_0, sums_0 * shrink[:, None], WIDEN)
        if PIECE < DIM:
            sums_1 = product(weights, entries_1, sums_1 * shrink[:, None], WIDEN)
        if 2 * PIECE < DIM:
            sums_2 = product(weights, entries_2, sums_2 * shrink[:, None], WIDEN)
        if 3 * PIECE < DIM:
            sums_3 = product(weights, entries_3, sums_3 * shrink[:, None], WIDEN)
        entries_0, entries_1, entries_2, entries_3 = next_0, next_1, next_2, next_3
    total = tl.where(spoilt, float("nan"), total)
    _write(out + at, sums_0, total, real, 0, DIM, PIECE)
    _write(out + at, sums_1, total, real, PIECE, DIM, PIECE)
    _write(out + at, sums_2, total, real, 2 * PIECE, DIM, PIECE)
    _write(out + at, sums_3, total, real, 3 * PIECE, DIM, PIECE)
    tl.store(lse + t * HEADS + h, top + tl.log2(total), mask=real)
