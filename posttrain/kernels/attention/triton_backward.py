"""Sparse attention on the GPU, backward: gradients by queries, both stores and the sink, without atomics.

Three passes over chunks of tokens, which bound the memory:

1. For each token and block of its entries: the weights again, the gradients by its scores, and from both the rows that
   the token adds to the gradients of its entries. All heads are summed inside; a row goes to memory once.
2. For each token: its gradient by queries, from the gradients by scores.
3. For each row of a store: the sum of the rows of all tokens that read it, in the order of tokens. A stable sort of the
   index gives these lists.


Counts of operations and bytes, and what else was considered: docs/kernels/attention.md.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.attention.triton_parts import INTERPRETED, UNITS, Entries, head_tile, product, row_width

CHUNK_BYTES = 3 * 2**29
"""Scratch for one chunk of tokens."""

MANY_ROWS = 2**15
"""Stores with more rows than this have more of them summed by one program, most of them read by nobody."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the programs for one dtype."""

    entries: int
    """Entries of one program of the first pass."""
    channels: int
    """Channels of a row that the first pass takes at once."""
    entries_for_queries: int
    """Entries of one step of the second pass."""
    warps: int
    stages: int
    stages_for_queries: int
    stages_wide: int
    """The same for stores in fp32 beside narrower queries."""
    registers: int | None
    """Limit for a thread of the first pass: with 128, two programs fit on a multiprocessor."""


NARROW = Tiles(
    *(128, 64, 32),
    warps=8,
    stages=3,
    stages_for_queries=7,
    stages_wide=5,
    registers=128,
)
SINGLE = Tiles(
    *(32, 32, 16),
    warps=4,
    stages=1,
    stages_for_queries=1,
    stages_wide=1,
    registers=None,
)


def tiles_for(dtype: torch.dtype) -> Tiles:
    """Sizes for queries of this dtype."""
    return SINGLE if dtype is torch.float32 else NARROW


@triton.jit
def delta_kernel(out, gradient, delta, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """`delta[T, H]`: product of a head's result with its gradient, which is what each score's gradient is less by."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, CHUNK)
    at = t * HEADS * DIM + h[:, None] * DIM + d[None, :]
    sums = tl.zeros([TILE, CHUNK], tl.float32)
    for c in range(0, DIM, CHUNK):
        real = (h < HEADS)[:, None] & (d < DIM - c)[None, :]
        ours = tl.load(out + at + c, mask=real, other=0.0).to(tl.float32)
        sums += ours * tl.load(gradient + at + c, mask=real, other=0.0).to(tl.float32)
    tl.store(delta + t * HEADS + h, tl.sum(sums, 1), mask=h < HEADS)


@triton.jit
def entries_kernel(
    q,
    gradient,
    store_a,
    store_b,
    rows,
    counts,
    lse,
    delta,
    dscores,
    parts,
    stride_a,
    stride_b,
    columns_a,
    columns,
    blocks_a,
    blocks,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    FOR_STORES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`dscores[T, K, TILES · TILE]` and `parts[T, K, TILES, D]` of one block of one token's entries."""
    t = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    group = tl.program_id(1)
    first = block < blocks_a
    start = tl.where(first, block, block - blocks_a) * BLOCK
    count = tl.load(counts + 2 * t + tl.where(first, 0, 1))
    if start < count:
        k = tl.arange(0, BLOCK)
        h = group * TILE + tl.arange(0, TILE)
        d = tl.arange(0, CHUNK)
        column = t * columns + tl.where(first, start, start + columns_a) + k
        inside = start + k < count
        row = tl.load(rows + column, mask=inside, other=0)
        store = tl.where(first, store_a, store_b)
        stride = tl.where(first, stride_a, stride_b)
        entry_at = store + row.to(tl.int64)[:, None] * stride + d[None, :]
        head_at = t * HEADS * DIM + h[:, None] * DIM + d[None, :]
        heads = (h < HEADS)[:, None]
        scores = tl.zeros([BLOCK, TILE], tl.float32)
        dweights = tl.zeros([BLOCK, TILE], tl.float32)
        for c in tl.range(0, DIM, CHUNK, num_stages=STAGES):
            channels = (d < DIM - c)[None, :]
            queries = tl.load(q + head_at + c, mask=heads & channels, other=0.0)
            slopes = tl.load(gradient + head_at + c, mask=heads & channels, other=0.0)
            entries = tl.load(entry_at + c, mask=inside[:, None] & channels, other=0.0).to(queries.dtype)
            scores = product(entries, tl.trans(queries), scores, WIDEN)
            dweights = product(entries, tl.trans(slopes), dweights, WIDEN)
        norm = tl.load(lse + t * HEADS + h, mask=h < HEADS, other=0.0)
        less = tl.load(delta + t * HEADS + h, mask=h < HEADS, other=0.0)
        exact = tl.where(inside[:, None], tl.exp2(scores * (scale * UNITS) - norm[None, :]), 0.0)
        slope = (exact * (dweights - less[None, :]) * scale).to(q.dtype.element_ty)
        weights = exact.to(q.dtype.element_ty)
        score_at = column[:, None] * (TILES * TILE) + h[None, :]
        tl.store(dscores + score_at, slope, mask=inside[:, None])
        if FOR_STORES:
            part_at = parts + (column[:, None] * TILES + group) * DIM + d[None, :]
            for c in tl.range(0, DIM, CHUNK, num_stages=STAGES):
                channels = (d < DIM - c)[None, :]
                queries = tl.load(q + head_at + c, mask=heads & channels, other=0.0)
                slopes = tl.load(gradient + head_at + c, mask=heads & channels, other=0.0)
                part = product(slope, queries, tl.zeros([BLOCK, CHUNK], tl.float32), WIDEN)
                part = product(weights, slopes, part, WIDEN)
                tl.store(part_at + c, part.to(parts.dtype.element_ty), mask=inside[:, None] & channels)


@triton.jit
def queries_kernel(
    dscores,
    store_a,
    store_b,
    rows,
    counts,
    dq,
    stride_a,
    stride_b,
    columns_a,
    columns,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`dq[T, H, D]`: gradients by scores times entries; axis 0 of the grid is tokens, 1 head tiles."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)
    k = tl.arange(0, BLOCK)
    count_a = tl.maximum(tl.load(counts + 2 * t), 0)
    start_b = tl.cdiv(count_a, BLOCK) * BLOCK
    end = start_b + tl.maximum(tl.load(counts + 2 * t + 1), 0)
    rows += t * columns
    dscores += t * columns * (TILES * TILE)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for start in tl.range(0, end, BLOCK, num_stages=STAGES):
        first = start < start_b
        inside = start + k < tl.where(first, count_a, end)
        column = tl.where(first, start, start - start_b + columns_a) + k
        row = tl.load(rows + column, mask=inside, other=0)
        store = tl.where(first, store_a, store_b)
        stride = tl.where(first, stride_a, stride_b)
        score_at = dscores + column[:, None] * (TILES * TILE) + h[None, :]
        slope = tl.load(score_at, mask=inside[:, None], other=0.0)
        entry_at = store + row.to(tl.int64)[:, None] * stride + d[None, :]
        entries = tl.load(entry_at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0).to(slope.dtype)
        sums = product(tl.trans(slope), entries, sums, WIDEN)
    at = dq + t * HEADS * DIM + h[:, None] * DIM + d[None, :]
    tl.store(at, sums.to(dq.dtype.element_ty), mask=(h < HEADS)[:, None] & (d < DIM)[None, :])


@triton.jit
def rows_kernel(
    parts,
    order,
    bounds,
    sums,
    size,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds to `sums[S, D]` (fp32) the parts `[N, TILES, D]` of each row's readers, `order[bounds[s]:bounds[s + 1]]`."""
    d = tl.arange(0, WIDTH)
    r = tl.arange(0, BLOCK)
    # The last rows first: those of the second store have the most readers, and what begins last should end soon.
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    for s in range(begin, tl.minimum(begin + ROWS, size)):
        start = tl.load(bounds + s)
        end = tl.load(bounds + s + 1)
        if start < end:
            ours = tl.zeros([BLOCK, WIDTH], tl.float32)
            following = tl.load(order + start + r, mask=start + r < end, other=0)
            for i in range(start, end, BLOCK):
                inside = i + r < end
                reader = following
                following = tl.load(order + i + BLOCK + r, mask=i + BLOCK + r < end, other=0)
                for group in tl.static_range(TILES):
                    part_at = parts + (reader[:, None] * TILES + group) * DIM + d[None, :]
                    part = tl.load(part_at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
                    ours += part.to(tl.float32)
            at = sums + tl.cast(s, tl.int64) * DIM + d
            before = tl.load(at, mask=d < DIM, other=0.0)
            tl.store(at, before + tl.sum(ours, 0), mask=d < DIM)


def readers(entries: Entries) -> tuple[Tensor, Tensor]:
    """Who reads each row of the stores, those of the first store first.

    Returns:
        Positions in the flattened `rows_TK`, sorted by the row that stands there, then by position (int64); and int32
        `[S + 1]` bounds of each row's share of them.
    """
    first, second = len(entries.store_a), len(entries.store_b)
    rows_a, rows_b = entries.rows_TK.tensor_split([entries.columns_a], 1)
    nobody = first + second
    rows = torch.cat((rows_a.where(rows_a >= 0, nobody), (rows_b + first).where(rows_b >= 0, nobody)), 1)
    if nobody < 2**15:
        rows = rows.short()  # half the passes of a radix sort
    ordered, order = rows.flatten().sort(stable=True)
    numbers = torch.arange(nobody + 1, dtype=rows.dtype, device=rows.device)
    return order, torch.searchsorted(ordered, numbers, out_int32=True)


def chunk_tokens(tokens: int, columns: int, heads: int, dim: int, dtype: torch.dtype) -> int:
    """Tokens of one chunk, so that its scratch stays within `CHUNK_BYTES`."""
    tile = head_tile(heads, dtype)
    scratch = columns * (
        triton.cdiv(heads, tile) * (tile + dim) * dtype.itemsize + 40
    )  # 40: sorting an entry's row number
    most = max(1, CHUNK_BYTES // max(scratch, 1))
    return math.ceil(tokens / math.ceil(tokens / most)) if tokens else 1


def _passes(
    q_THD: Tensor,
    out_THD: Tensor,
    dout_THD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    dq_THD: Tensor,
    scale: float,
    entries: Entries,
    *,
    for_stores: bool,
) -> Tensor:
    """Over the entries of these tokens, then over the tokens: writes `delta_TH` and `dq_THD`; returns the parts
    `[T, K, G, D]`."""
    tokens, heads, dim = q_THD.shape
    columns = entries.rows_TK.shape[1]
    tiles, tile = tiles_for(q_THD.dtype), head_tile(heads, q_THD.dtype)
    groups = triton.cdiv(heads, tile)
    _deltas(out_THD, dout_THD, delta_TH)
    dscores = q_THD.new_empty(tokens, columns, groups * tile)
    parts = q_THD.new_empty(tokens, columns, groups, dim) if for_stores else dscores
    sources = *entries.stores, entries.rows_TK, entries.counts_T2
    shape = {"HEADS": heads, "DIM": dim, "TILE": tile, "TILES": groups, "WIDEN": INTERPRETED}
    blocks_a = triton.cdiv(entries.columns_a, tiles.entries)
    blocks = blocks_a + triton.cdiv(columns - entries.columns_a, tiles.entries)
    if blocks:
        entries_kernel[(tokens * blocks, groups)](
            *(q_THD, dout_THD, *sources, lse_TH, delta_TH, dscores, parts),
            *(*entries.strides, entries.columns_a, columns, blocks_a, blocks, scale),
            **shape,
            BLOCK=tiles.entries,
            CHUNK=min(tiles.channels, row_width(dim)),
            STAGES=tiles.stages,
            FOR_STORES=for_stores,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )
    stages = tiles.stages_wide if entries.wide_for(q_THD) else tiles.stages_for_queries
    queries_kernel[(tokens, groups)](
        *(dscores, *sources, dq_THD, *entries.strides, entries.columns_a, columns),
        **shape,
        WIDTH=row_width(dim),
        BLOCK=tiles.entries_for_queries,
        STAGES=stages,
        num_warps=tiles.warps,
        num_stages=stages,
    )
    return parts


def _deltas(out_THD: Tensor, dout_THD: Tensor, delta_TH: Tensor) -> None:
    """Writes `delta_TH`."""
    tokens, heads, dim = out_THD.shape
    tile = min(16, triton.next_power_of_2(heads))
    shape = {"HEADS": heads, "DIM": dim, "TILE": tile, "CHUNK": min(128, row_width(dim))}
    delta_kernel[(tokens, triton.cdiv(heads, tile))](out_THD, dout_THD, delta_TH, **shape)


def _add_rows(parts_TKGD: Tensor, entries: Entries, sums_SD: Tensor) -> None:
    """Adds what these tokens' entries (in `G` tiles of heads) contribute to the rows of both stores."""
    dim, size = sums_SD.shape[1], len(sums_SD)
    order, bounds = readers(entries)
    together = 2 if size <= MANY_ROWS else 8
    rows_kernel[(triton.cdiv(size, together),)](
        *(parts_TKGD, order, bounds, sums_SD, size),
        DIM=dim,
        TILES=parts_TKGD.shape[2],
        WIDTH=row_width(dim),
        BLOCK=16,
        ROWS=together,
    )


def gradients(
    q_THD: Tensor,
    sink_H: Tensor,
    scale: float,
    entries: Entries,
    out_THD: Tensor,
    lse_TH: Tensor,
    dout_THD: Tensor,
    *,
    for_stores: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by queries, sink and both stores (None unless asked for), each in the dtype of what it is of.

    Args:
        lse_TH: log2 of the softmax's denominators, the sink included, fp32.
        dout_THD: gradient by `out_THD`; contiguous like `q_THD` and `out_THD`.
    """
    tokens, heads, dim = q_THD.shape
    dq_THD, delta_TH = torch.empty_like(q_THD), torch.empty_like(lse_TH)
    sizes = [len(store) for store in entries.stores]
    sums_SD = q_THD.new_zeros(sum(sizes), dim, dtype=torch.float32) if for_stores and any(sizes) else None
    if q_THD.numel():
        step = chunk_tokens(tokens, entries.rows_TK.shape[1], heads, dim, q_THD.dtype)
        for start in range(0, tokens, step):
            part = slice(start, min(start + step, tokens))
            mine = entries.tokens(part)
            tensors = q_THD[part], out_THD[part], dout_THD[part], lse_TH[part], delta_TH[part], dq_THD[part]
            parts_TKGD = _passes(*tensors, float(scale), mine, for_stores=sums_SD is not None)
            if sums_SD is not None and mine.rows_TK.shape[1]:
                _add_rows(parts_TKGD, mine, sums_SD)
            del parts_TKGD  # before the next chunk's
    sinks_TH = torch.exp2(sink_H.float() * UNITS.value - lse_TH)
    dsink_H = -(sinks_TH * delta_TH).sum(0).to(sink_H.dtype)
    if not for_stores:
        return dq_THD, dsink_H, None, None
    if sums_SD is None:
        return dq_THD, dsink_H, torch.zeros_like(entries.store_a), torch.zeros_like(entries.store_b)
    dstore_a, dstore_b = sums_SD.to(entries.store_a.dtype).split(sizes)
    return dq_THD, dsink_H, dstore_a, dstore_b
