"""Sparse attention on Hopper at V4's shapes, forward, a level below Triton (Gluon): copies and products placed by hand.

The algorithm of `triton.forward_kernel`, block by block of 64 entries, with V4's 512 channels and up to 64 heads for a
program. What Triton's pipeline cannot do: while one block is multiplied, the next one is copied to the other of two
buffers. Counts and what was measured: docs/kernels/attention.md.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma

from posttrain.kernels.attention.triton_parts import INTERPRETED, UNITS, Entries

TILE = gl.constexpr(64)
"""Heads of one program: the rows of a matrix instruction."""

BLOCK = gl.constexpr(64)
"""Entries of one step."""

DIM = gl.constexpr(512)

VECTOR = gl.constexpr(8)
"""Numbers of 16 bits in one copy; rows of stores begin at a multiple of it."""

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK.value // 2, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, DIM.value // 2, 16]))
COPY = gl.constexpr(gl.BlockedLayout([1, VECTOR.value], [1, 32], [8, 1], [1, 0]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
WARPS = 8


@gluon.jit
def _exist(start, count_a, start_b, end, LAYOUT: gl.constexpr):
    """Which places of the block that begins at `start` hold an entry."""
    return start + gl.arange(0, BLOCK, LAYOUT) < gl.where(start < start_b, count_a, end)


@gluon.jit
def _rows(rows, start, count_a, start_b, end, columns_a, LAYOUT: gl.constexpr):
    """Rows of the block's entries in their store, and which of them exist."""
    exist = _exist(start, count_a, start_b, end, LAYOUT)
    column = gl.where(start < start_b, start, start - start_b + columns_a) + gl.arange(0, BLOCK, LAYOUT)
    return gl.load(rows + column, mask=exist, other=0), exist


@gluon.jit
def _fetch(buffer, row, exist, first, store_a, store_b, vectors_a, vectors_b):
    """Starts to copy a block of entries of the first or second store; those that do not exist become zeros."""
    store = gl.where(first, store_a, store_b)
    stride = gl.where(first, vectors_a, vectors_b) * VECTOR
    d = gl.arange(0, DIM, gl.SliceLayout(0, COPY))
    at = store + (row.to(gl.int64) * stride)[:, None] + d[None, :]
    async_copy.async_copy_global_to_shared(buffer, at, mask=exist[:, None])
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["columns_a", "columns"])
def forward_kernel(
    q,
    store_a,
    store_b,
    rows,
    counts,
    sink,
    out,
    lse,
    vectors_a,
    vectors_b,
    columns_a,
    columns,
    scale,
    HEADS: gl.constexpr,
):
    """`out[T, H, D]` and `lse[T, H]` (sink included, in units of log 2); axis 0 of the grid is tokens, 1 head tiles."""
    dtype: gl.constexpr = q.dtype.element_ty
    LIST: gl.constexpr = gl.SliceLayout(1, COPY)
    HEAD: gl.constexpr = gl.SliceLayout(1, SCORES)
    queries = gl.allocate_shared_memory(dtype, [TILE, DIM], SHARED)
    buffers = gl.allocate_shared_memory(dtype, [2, BLOCK, DIM], SHARED)
    shared_weights = gl.allocate_shared_memory(dtype, [TILE, BLOCK], SHARED)

    t = gl.program_id(0).to(gl.int64)
    heads = gl.program_id(1) * TILE + gl.arange(0, TILE, LIST)
    at = (t * HEADS + heads)[:, None] * DIM + gl.arange(0, DIM, gl.SliceLayout(0, COPY))[None, :]
    real = (heads < HEADS)[:, None]
    async_copy.async_copy_global_to_shared(queries, q + at, mask=real)  # waited for with the first entries

    count_a = gl.load(counts + 2 * t)
    count_b = gl.load(counts + 2 * t + 1)
    spoilt = gl.minimum(count_a, count_b) < 0
    count_a = gl.maximum(count_a, 0)
    start_b = (count_a + BLOCK - 1) // BLOCK * BLOCK
    end = start_b + gl.maximum(count_b, 0)
    rows += t * columns
    row, exist = _rows(rows, 0, count_a, start_b, end, columns_a, LIST)
    _fetch(buffers.index(0), row, exist, start_b > 0, store_a, store_b, vectors_a, vectors_b)
    row, exist = _rows(rows, BLOCK, count_a, start_b, end, columns_a, LIST)

    head = gl.program_id(1) * TILE + gl.arange(0, TILE, HEAD)
    top = gl.load(sink + head, mask=head < HEADS, other=0.0).to(gl.float32) * UNITS
    sink_total = gl.full([TILE], 1.0, gl.float32, HEAD)
    totals = gl.zeros([TILE, BLOCK], gl.float32, SCORES)
    sums = gl.zeros([TILE, DIM], gl.float32, SUMS)
    side = 0
    for start in range(0, end, BLOCK):
        following = start + BLOCK
        _fetch(buffers.index(1 - side), row, exist, following < start_b, store_a, store_b, vectors_a, vectors_b)
        row, exist = _rows(rows, following + BLOCK, count_a, start_b, end, columns_a, LIST)
        async_copy.wait_group(1)
        fence_async_shared()
        entries = buffers.index(side)
        scores = gl.zeros([TILE, BLOCK], gl.float32, SCORES)
        scores = warpgroup_mma(queries, entries.permute([1, 0]), scores, use_acc=False) * (scale * UNITS)
        here = _exist(start, count_a, start_b, end, gl.SliceLayout(0, SCORES))
        scores = gl.where(here[None, :], scores, float("-inf"))
        higher = gl.maximum(top, gl.max(scores, 1))
        weights = gl.exp2(scores - higher[:, None])
        shrink = gl.exp2(top - higher)
        top = higher
        sink_total *= shrink
        totals = totals * shrink[:, None] + weights
        sums *= gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
        shared_weights.store(weights.to(dtype))
        fence_async_shared()
        sums = warpgroup_mma(shared_weights, entries, sums)
        side = 1 - side
    async_copy.wait_group(0)

    total = gl.where(spoilt, float("nan"), sink_total + gl.sum(totals, 1))
    gl.store(lse + t * HEADS + head, top + gl.log2(total), mask=head < HEADS)
    sums /= gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
    queries.store(sums.to(dtype))
    gl.store(out + at, queries.load(COPY), mask=real)


def serves(q_THD: Tensor) -> bool:
    """Whether queries of this shape and dtype are computed here, on the device where they are.

    Nothing else may have a say in it: trainer and sampler have to come to the same choice.
    """
    if INTERPRETED or q_THD.itemsize != 2 or q_THD.shape[2] != DIM.value or q_THD.shape[1] <= TILE.value // 2:
        return False
    return torch.cuda.get_device_capability(q_THD.device) == (9, 0)


def _copyable(store_SD: Tensor, dtype: torch.dtype) -> Tensor:
    """The store in this dtype, with rows where the copies can read them: itself, but for unusual ones."""
    store_SD = store_SD.to(dtype)
    aligned = store_SD.data_ptr() % 16 == 0 and store_SD.stride(0) % VECTOR.value == 0
    return store_SD if aligned else store_SD.clone(memory_format=torch.contiguous_format)


def attend(q_THD: Tensor, sink_H: Tensor, scale: float, entries: Entries) -> tuple[Tensor, Tensor]:
    """As `triton.attend`, for queries that `serves` accepts, of at least one token."""
    tokens, heads, _ = q_THD.shape
    out_THD, lse_TH = torch.empty_like(q_THD), q_THD.new_empty(tokens, heads, dtype=torch.float32)
    stores = [_copyable(store, q_THD.dtype) for store in entries.stores]
    vectors = [store.stride(0) // VECTOR.value for store in stores]
    forward_kernel[tokens, triton.cdiv(heads, TILE.value)](
        *(q_THD, *stores, entries.rows_TK, entries.counts_T2, sink_H, out_THD, lse_TH, *vectors),
        *(entries.columns_a, entries.rows_TK.shape[1], float(scale)),
        HEADS=heads,
        num_warps=WARPS,
    )
    return out_THD, lse_TH
