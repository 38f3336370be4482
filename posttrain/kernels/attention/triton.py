"""Sparse attention on the GPU, forward: one program takes one token with up to 64 of its heads.

A first kernel moves the entries that exist to the front of each index row. The second walks that list in blocks of a
fixed number of entries, first source before second, with an online softmax that starts from the sink. What a token
gets is thus a function of its own query and of its own list of entries: neither other tokens, nor padding, nor where
an entry is stored can change a bit, and decoding runs the same program as prefill.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.attention import hopper, triton_backward
from posttrain.kernels.attention.triton_parts import INTERPRETED, UNITS, Entries, head_tile, places, product, row_width
from posttrain.kernels.compiled import differentiable

MOST_CHANNELS = 512
"""A head's sums stay in registers."""

DTYPES = torch.float32, torch.bfloat16, torch.float16

HIDE_CHAIN = True
"""Where one product feeds another, Triton has all warps compute all of the first one. A branch that is always taken
hides the second from it, and the warps share the scores out among them."""


@dataclass(frozen=True)
class Tiles:
    """Entries of one block, and how a program runs. Chosen by dtype alone, so that no token count changes a bit."""

    entries: int
    warps: int
    stages: int
    stages_wide: int
    """For stores in fp32 beside narrower queries."""


# A block's scores read all queries from shared memory, however few entries it has, and its steps wait for each other:
# 64 entries at once rather than 32 in more stages.
NARROW = Tiles(entries=64, warps=8, stages=3, stages_wide=1)
SINGLE = Tiles(entries=16, warps=4, stages=1, stages_wide=1)


@triton.jit
def _pack_source(index, rows, count, columns, size, WIDTH: tl.constexpr):
    """One token and source: the rows that exist first, in order, then -1; a row beyond the store spoils the list."""
    column = tl.arange(0, WIDTH)
    there = column < columns
    row = tl.load(index + column, mask=there, other=-1)
    beyond = tl.max((row >= size).to(tl.int32), 0)
    exists = ((row >= 0) & (beyond == 0)).to(tl.int32)
    absent = (there & (exists == 0)).to(tl.int32)
    found = tl.sum(exists, 0)
    place = tl.where(exists != 0, tl.cumsum(exists, 0), found + tl.cumsum(absent, 0)) - 1
    tl.store(rows + place, tl.where(exists != 0, row, -1).to(tl.int32), mask=there)
    tl.store(count, tl.where(beyond != 0, -1, found))


@triton.jit(do_not_specialize=["columns_a", "columns_b", "size_a", "size_b"])
def pack_kernel(
    index_a,
    index_b,
    rows,
    counts,
    columns_a,
    columns_b,
    size_a,
    size_b,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
):
    """Index rows int64 `[T, A]` and `[T, B]` to `rows` int32 `[T, A + B]` and `counts` int32 `[T, 2]`."""
    t = tl.program_id(0).to(tl.int64)
    rows += t * (columns_a + columns_b)
    _pack_source(index_a + t * columns_a, rows, counts + 2 * t, columns_a, size_a, WIDTH_A)
    _pack_source(index_b + t * columns_b, rows + columns_a, counts + 2 * t + 1, columns_b, size_b, WIDTH_B)


@triton.jit
def _weigh(query, entries, inside, top, total, scale, WIDEN: tl.constexpr):
    """Weights of a block's entries, relative to the highest score yet; by how much the sums before shrink for it."""
    scores = tl.zeros([query.shape[0], entries.shape[0]], tl.float32)
    scores = product(query, tl.trans(entries), scores, WIDEN) * (scale * UNITS)
    scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    return weights.to(query.dtype), shrink, total, higher


@triton.jit(do_not_specialize=["columns_a", "columns"])
def forward_kernel(
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
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HIDE_CHAIN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`out[T, H, D]` and `lse[T, H]` (sink included, in units of log 2); axis 0 of the grid is tokens, 1 head tiles."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)
    at = t * HEADS * DIM + h[:, None] * DIM + d[None, :]
    real = (h < HEADS)[:, None] & (d < DIM)[None, :]
    query = tl.load(q + at, mask=real, other=0.0)
    top = tl.load(sink + h, mask=h < HEADS, other=0.0).to(tl.float32) * UNITS
    total = tl.full([TILE], 1.0, tl.float32)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    count_a = tl.load(counts + 2 * t)
    count_b = tl.load(counts + 2 * t + 1)
    spoilt = tl.minimum(count_a, count_b) < 0
    count_a = tl.maximum(count_a, 0)
    start_b = tl.cdiv(count_a, BLOCK) * BLOCK
    end = start_b + tl.maximum(count_b, 0)
    rows += t * columns
    for start in tl.range(0, end, BLOCK, num_stages=STAGES):
        column, inside = places(start, count_a, start_b, end, columns_a, BLOCK)
        row = tl.load(rows + column, mask=inside, other=0)
        store = tl.where(start < start_b, store_a, store_b)
        stride = tl.where(start < start_b, stride_a, stride_b)
        entry_at = store + row.to(tl.int64)[:, None] * stride + d[None, :]
        entries = tl.load(entry_at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0).to(query.dtype)
        weights = tl.zeros([TILE, BLOCK], query.dtype)
        shrink = tl.full([TILE], 1.0, tl.float32)
        if HIDE_CHAIN:
            if start < end:  # always
                weights, shrink, total, top = _weigh(query, entries, inside, top, total, scale, WIDEN)
        else:
            weights, shrink, total, top = _weigh(query, entries, inside, top, total, scale, WIDEN)
        sums = product(weights, entries, sums * shrink[:, None], WIDEN)
    total = tl.where(spoilt, float("nan"), total)
    tl.store(out + at, (sums / total[:, None]).to(query.dtype), mask=real)
    tl.store(lse + t * HEADS + h, top + tl.log2(total), mask=h < HEADS)


def pack(store_a: Tensor, store_b: Tensor, index_a: Tensor, index_b: Tensor) -> Entries:
    """Lists of the entries that exist, from int64 index rows `[T, K]` (-1 for none) into two stores `[S, D]`."""
    tokens, columns_a, columns_b = len(index_a), index_a.shape[1], index_b.shape[1]
    rows = index_a.new_empty(tokens, columns_a + columns_b, dtype=torch.int32)
    counts = index_a.new_empty(tokens, 2, dtype=torch.int32)
    if tokens:
        sizes = columns_a, columns_b, len(store_a), len(store_b)
        widths = [triton.next_power_of_2(max(columns, 16)) for columns in (columns_a, columns_b)]
        pack_kernel[(tokens,)](index_a, index_b, rows, counts, *sizes, *widths)
    return Entries(store_a, store_b, rows, counts, columns_a)


def attend(q_THD: Tensor, sink_H: Tensor, scale: float, entries: Entries) -> tuple[Tensor, Tensor]:
    """The result `[T, H, D]` in the dtype of `q_THD`, and log2 of the softmax's denominators `[T, H]`, fp32.

    Args:
        q_THD: contiguous, fp32, bf16 or fp16.
        sink_H: contiguous.
    """
    tokens, heads, dim = q_THD.shape
    if tokens and hopper.serves(q_THD):
        return hopper.attend(q_THD, sink_H, scale, entries)
    out_THD, lse_TH = torch.empty_like(q_THD), q_THD.new_empty(tokens, heads, dtype=torch.float32)
    tiles = SINGLE if q_THD.dtype is torch.float32 else NARROW
    tile = head_tile(heads, q_THD.dtype)
    stages = tiles.stages_wide if entries.wide_for(q_THD) else tiles.stages
    grid = tokens, triton.cdiv(heads, tile)
    inputs = q_THD, *entries.stores, entries.rows_TK, entries.counts_T2, sink_H, out_THD, lse_TH
    numbers = *entries.strides, entries.columns_a, entries.rows_TK.shape[1], float(scale)
    shape = {"HEADS": heads, "DIM": dim, "TILE": tile, "BLOCK": tiles.entries, "WIDEN": INTERPRETED}
    if not q_THD.numel():
        return out_THD, lse_TH
    forward_kernel[grid](
        *(*inputs, *numbers),
        **shape,
        WIDTH=row_width(dim),
        STAGES=stages,
        HIDE_CHAIN=HIDE_CHAIN,
        num_warps=tiles.warps,
        num_stages=stages,
    )
    return out_THD, lse_TH


class _SparseAttention(torch.autograd.Function):
    """Two sources; the second may have no columns. Keeps the result and the denominators, not the weights."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, sink_H: Tensor, scale: float, store_a: Tensor, store_b: Tensor, *indices: Tensor
    ) -> Tensor:
        entries = pack(store_a, store_b, *indices)
        out_THD, lse_TH = attend(q_THD, sink_H, scale, entries)
        ctx.save_for_backward(q_THD, sink_H, store_a, store_b, entries.rows_TK, entries.counts_T2, out_THD, lse_TH)
        ctx.scale, ctx.columns_a = scale, entries.columns_a
        return out_THD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, sink_H, store_a, store_b, rows_TK, counts_T2, out_THD, lse_TH = ctx.saved_tensors
        entries = Entries(store_a, store_b, rows_TK, counts_T2, ctx.columns_a)
        inputs = q_THD, sink_H, ctx.scale, entries, out_THD, lse_TH, gradients[0].contiguous()
        for_stores = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dq_THD, dsink_H, dstore_a, dstore_b = triton_backward.gradients(*inputs, for_stores=for_stores)
        return dq_THD, dsink_H, None, dstore_a, dstore_b, None, None


def sparse_attention(
    q_THD: Tensor, sink_H: Tensor, scale: float, store_a: Tensor, store_b: Tensor, index_a: Tensor, index_b: Tensor
) -> Tensor:
    """See the op; stores may have rows that stand apart, and be fp32 beside narrower queries."""
    if q_THD.shape[2] > MOST_CHANNELS:
        raise ValueError(f"sparse_attention: q has {q_THD.shape[2]} channels; expected at most {MOST_CHANNELS}")
    if q_THD.dtype not in DTYPES:
        raise ValueError(f"sparse_attention: q is {q_THD.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if store_a.dtype is not store_b.dtype:
        store_a, store_b = store_a.to(q_THD.dtype), store_b.to(q_THD.dtype)
    stores = [store if store.stride(1) == 1 else store.contiguous() for store in (store_a, store_b)]
    indices = index_a.long().contiguous(), index_b.long().contiguous()
    return differentiable(_SparseAttention, q_THD.contiguous(), sink_H.contiguous(), scale, *stores, *indices)
