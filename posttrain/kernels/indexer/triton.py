"""The indexer on the GPU: scores and their gradients. Selection and the training objective are in files beside this.

Scores. A program holds one tile of keys and meets a group of tokens, one after another: `keys · q[t]ᵀ` is one
product of `[entries, D]` by `[D, heads]`, in which the heads of an entry lie in few threads, so that
`Σ_h w relu(·)` costs little beside it. A score is one sum along `D` and one along the heads, whose order follows
from the tile's shape alone; the group is a loop, so its length, and whatever else is in it, changes no bit.

Gradients. Queries and weights: one program for each token. Keys: where tokens share their candidates, one program
for each tile of keys and range of tokens, ranges added in order. Where each token names its own rows, every (token,
entry) pair writes its share to its place in the order of rows, and one program for each row adds up its shares.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.compiled import differentiable, narrow
from posttrain.kernels.indexer.candidates import Candidates
from posttrain.kernels.indexer.triton_divergence import index_divergence
from posttrain.kernels.indexer.triton_topk import select, topk_stable

__all__ = ["index_divergence", "index_scores", "index_topk", "topk_stable"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""

BUFFER = 2**25
"""Scores that `index_topk` holds at once: 128 MiB of fp32."""

PROGRAMS = 2048
"""Tokens share a tile of keys once there are more programs than this; how many share it changes no bit."""

SHARES = 2**26
"""Numbers in the buffer of shares of a key gradient: 256 MiB of fp32."""


@triton.jit
def long(number):
    """int64, also of a loop's counter, which is a Python number to the interpreter."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def load_queries(q, token, heads: tl.constexpr, dim: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """`[HEADS, DIM]` of one token, zeros past its heads and channels."""
    h = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    at = q + long(token) * (heads * dim) + h[:, None] * dim + d[None, :]
    return tl.load(at, mask=(h < heads)[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def load_weights(weights, token, heads: tl.constexpr, HEADS: tl.constexpr):
    """`[HEADS]` of one token in fp32."""
    h = tl.arange(0, HEADS)
    return tl.load(weights + long(token) * heads + h, mask=h < heads, other=0.0).to(tl.float32)


@triton.jit
def load_rows(rows, pages, entries, token, sequence, limit, columns, page_stride, page_size, EXPLICIT: tl.constexpr):
    """Store rows of these entries, int64, -1 for none: named one by one, or found in a page table."""
    if EXPLICIT:
        found = tl.load(rows + long(token) * columns + entries, mask=entries < limit, other=-1)
    else:
        page = pages + long(sequence) * page_stride + entries // page_size
        found = tl.load(page, mask=entries < limit, other=0) + entries % page_size
        found = tl.where(entries < limit, found, -1)
    return found.to(tl.int64)


@triton.jit
def load_keys(keys, rows, key_stride, dim: tl.constexpr, DIM: tl.constexpr):
    """`[entries, DIM]`, zeros where there is no row."""
    d = tl.arange(0, DIM)
    at = keys + rows[:, None] * key_stride + d[None, :]
    return tl.load(at, mask=(rows >= 0)[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit(do_not_specialize=["columns", "page_stride", "page_size", "first", "stop", "group", "floor"])
def scores_kernel(
    q,
    weights,
    keys,
    rows,
    count,
    sequence,
    starts,
    pages,
    out,
    key_stride,
    columns,
    page_stride,
    page_size,
    first,
    stop,
    group,
    floor,
    heads: tl.constexpr,
    dim: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPLICIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Axis 0 of the grid: groups of tokens from `first` to `stop`; axis 1: tiles of entries.

    Nothing is written past the last candidate of a group's tokens, nor for sequences whose tokens here have no more
    than `floor`.
    """
    begin = first + tl.program_id(0) * group
    end = tl.minimum(begin + group, stop)
    start = tl.program_id(1) * BLOCK
    entries = start + tl.arange(0, BLOCK)
    kind = q.dtype.element_ty
    if EXPLICIT:
        first_sequence = 0
        last_sequence = 0
    else:
        first_sequence = tl.load(sequence + begin).to(tl.int32)
        last_sequence = tl.load(sequence + end - 1).to(tl.int32)
    for number in range(first_sequence, last_sequence + 1):
        if EXPLICIT:
            low = begin
            high = end
            limit = columns
        else:
            low = tl.maximum(begin, tl.load(starts + number).to(tl.int32))
            high = tl.minimum(end, tl.load(starts + number + 1).to(tl.int32))
            limit = tl.load(count + high - 1, mask=high > low, other=0).to(tl.int32)
            limit = tl.where(limit > floor, limit, 0)
        high = tl.where(start < limit, high, low)
        rows_B = load_rows(rows, pages, entries, low, number, limit, columns, page_stride, page_size, EXPLICIT)
        keys_BD = load_keys(keys, rows_B, key_stride, dim, DIM).to(kind)
        if WIDEN:
            keys_BD = keys_BD.to(tl.float32)
        for token in range(low, high):
            q_HD = load_queries(q, token, heads, dim, HEADS, DIM)
            if WIDEN:
                q_HD = q_HD.to(tl.float32)
            weights_H = load_weights(weights, token, heads, HEADS)
            dots_BH = tl.dot(keys_BD, tl.trans(q_HD), input_precision="ieee")
            dots_BH = tl.maximum(dots_BH, 0.0, propagate_nan=tl.PropagateNan.ALL)
            scores_B = tl.sum(dots_BH * weights_H[None, :], 1)
            exists_B = rows_B >= 0
            if not EXPLICIT:
                exists_B = entries < tl.load(count + token)
            scores_B = tl.where(exists_B, scores_B, float("-inf"))
            at = out + long(token - first) * columns + entries
            tl.store(at, scores_B, mask=entries < columns)


@triton.jit(do_not_specialize=["columns", "page_stride", "page_size", "first"])
def query_gradient_kernel(
    q,
    weights,
    keys,
    rows,
    count,
    sequence,
    pages,
    slopes,
    slots,
    dq,
    dweights,
    shares,
    key_stride,
    columns,
    page_stride,
    page_size,
    first,
    heads: tl.constexpr,
    dim: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPLICIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program for each token from `first`: its gradients, and its shares of the key gradients if `EXPLICIT`."""
    token = first + tl.program_id(0)
    h = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    kind = q.dtype.element_ty
    q_HD = load_queries(q, token, heads, dim, HEADS, DIM)
    weights_H = load_weights(weights, token, heads, HEADS)
    if WIDEN:
        q_HD = q_HD.to(tl.float32)
    if EXPLICIT:
        number = token
        limit = columns
    else:
        number = tl.load(sequence + token).to(tl.int32)
        limit = tl.load(count + token).to(tl.int32)
    dq_HD = tl.zeros([HEADS, DIM], tl.float32)
    dweights_H = tl.zeros([HEADS], tl.float32)
    for start in range(0, limit, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        rows_B = load_rows(rows, pages, entries, token, number, limit, columns, page_stride, page_size, EXPLICIT)
        exists_B = rows_B >= 0
        keys_BD = load_keys(keys, rows_B, key_stride, dim, DIM).to(kind)
        slopes_B = tl.load(slopes + long(token) * columns + entries, mask=exists_B, other=0.0)
        if WIDEN:
            keys_BD = keys_BD.to(tl.float32)
        dots_BH = tl.dot(keys_BD, tl.trans(q_HD), input_precision="ieee")
        dweights_H += tl.sum(tl.maximum(dots_BH, 0.0) * slopes_B[:, None], 0)
        # In the inputs' dtype, as every operand of a matrix product.
        pulls_BH = tl.where(dots_BH > 0.0, slopes_B[:, None] * weights_H[None, :], 0.0).to(kind)
        if WIDEN:
            pulls_BH = pulls_BH.to(tl.float32)
        dq_HD = tl.dot(tl.trans(pulls_BH), keys_BD, dq_HD, input_precision="ieee")
        if EXPLICIT:
            shares_BD = tl.dot(pulls_BH, q_HD, input_precision="ieee")
            slots_B = tl.load(slots + long(tl.program_id(0)) * columns + entries, mask=exists_B, other=0)
            at = shares + slots_B.to(tl.int64)[:, None] * dim + d[None, :]
            tl.store(at, shares_BD, mask=exists_B[:, None] & (d < dim)[None, :])
    at = dq + long(token) * (heads * dim) + h[:, None] * dim + d[None, :]
    tl.store(at, dq_HD.to(dq.dtype.element_ty), mask=(h < heads)[:, None] & (d < dim)[None, :])
    at = dweights + long(token) * heads + h
    tl.store(at, dweights_H.to(dweights.dtype.element_ty), mask=h < heads)


@triton.jit
def row_sum_kernel(shares, bounds, sums, dim: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to `sums[row]` its shares, `shares[bounds[row] : bounds[row + 1]]`, in their order."""
    row = long(tl.program_id(0))
    d = tl.arange(0, DIM)
    begin = tl.load(bounds + row)
    end = tl.load(bounds + row + 1)
    sums_BD = tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        at = shares + n.to(tl.int64)[:, None] * dim + d[None, :]
        sums_BD += tl.load(at, mask=(n < end)[:, None] & (d < dim)[None, :], other=0.0)
    at = sums + row * dim + d
    tl.store(at, tl.load(at, mask=d < dim, other=0.0) + tl.sum(sums_BD, 0), mask=d < dim)


@triton.jit(do_not_specialize=["columns", "page_stride", "page_size", "size", "splits"])
def key_gradient_kernel(
    q,
    weights,
    keys,
    count,
    starts,
    pages,
    slopes,
    partials,
    key_stride,
    columns,
    page_stride,
    page_size,
    size,
    splits,
    heads: tl.constexpr,
    dim: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid: tiles of entries, sequences, ranges of tokens. `partials[range, row]` of a tile's rows."""
    start = tl.program_id(0) * BLOCK
    number = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.arange(0, DIM)
    kind = q.dtype.element_ty
    entries = start + tl.arange(0, BLOCK)
    begin = tl.load(starts + number).to(tl.int32)
    end = tl.load(starts + number + 1).to(tl.int32)
    limit = tl.load(count + end - 1, mask=end > begin, other=0).to(tl.int32)
    if start < limit:
        # Tokens that come before the tile's first entry is complete.
        before = tl.zeros([SCAN], tl.int32)
        for at in range(begin, end, SCAN):
            tokens = at + tl.arange(0, SCAN)
            counts = tl.load(count + tokens, mask=tokens < end, other=columns + 1)
            before += (counts <= start).to(tl.int32)
        first = begin + tl.sum(before, 0)
        length = tl.cdiv(end - first, splits)
        low = tl.minimum(first + split * length, end)
        high = tl.minimum(low + length, end)
        rows_B = load_rows(pages, pages, entries, low, number, limit, columns, page_stride, page_size, False)
        keys_BD = load_keys(keys, rows_B, key_stride, dim, DIM).to(kind)
        if WIDEN:
            keys_BD = keys_BD.to(tl.float32)
        sums_BD = tl.zeros([BLOCK, DIM], tl.float32)
        for token in range(low, high):
            q_HD = load_queries(q, token, heads, dim, HEADS, DIM)
            weights_H = load_weights(weights, token, heads, HEADS)
            exists_B = entries < tl.load(count + token)
            slopes_B = tl.load(slopes + long(token) * columns + entries, mask=exists_B, other=0.0)
            if WIDEN:
                q_HD = q_HD.to(tl.float32)
            dots_BH = tl.dot(keys_BD, tl.trans(q_HD), input_precision="ieee")
            pulls_BH = tl.where(dots_BH > 0.0, slopes_B[:, None] * weights_H[None, :], 0.0).to(kind)
            if WIDEN:
                pulls_BH = pulls_BH.to(tl.float32)
            sums_BD = tl.dot(pulls_BH, q_HD, sums_BD, input_precision="ieee")
        at = partials + (long(split) * size + rows_B)[:, None] * dim + d[None, :]
        tl.store(at, sums_BD, mask=(rows_B >= 0)[:, None] & (d < dim)[None, :])


def _shape(q_THD: Tensor) -> dict[str, Any]:
    """What all kernels here are compiled for."""
    heads, dim = q_THD.shape[1:]
    sizes = {"HEADS": max(16, triton.next_power_of_2(heads)), "DIM": max(16, triton.next_power_of_2(dim))}
    return {"heads": heads, "dim": dim, "WIDEN": INTERPRETED and q_THD.dtype is not torch.float32, **sizes}


def _tile(q_THD: Tensor, narrow_tile: int, single_tile: int) -> int:
    """Entries in a tile, by dtype: never by the number of tokens."""
    return single_tile if q_THD.dtype is torch.float32 else narrow_tile


def _lookup(candidates: Tensor | Candidates) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    """Tensors that say where candidates are (rows, count, sequence, starts, pages); columns and the pages' sizes."""
    if isinstance(candidates, Tensor):
        return (candidates,) * 5, (candidates.shape[1], 0, 1)
    pages_RP = candidates.pages_RP.contiguous()
    own = candidates.count_T.contiguous(), candidates.sequence_T.contiguous(), candidates.starts_R
    return (pages_RP, *own, pages_RP), (candidates.columns, pages_RP.shape[1], candidates.page_size)


def _score(
    q_THD: Tensor,
    weights_TH: Tensor,
    keys_SD: Tensor,
    candidates: Tensor | Candidates,
    out: Tensor,
    first: int,
    stop: int,
    floor: int = 0,
) -> None:
    """Scores of tokens `first` to `stop` into the rows of `out`, as far as they have candidates."""
    tensors, (columns, *sizes) = _lookup(candidates)
    block, explicit = _tile(q_THD, 128, 32), isinstance(candidates, Tensor)
    tiles = math.ceil(columns / block)
    group = 1 if explicit else min(32, max(1, (stop - first) * tiles // PROGRAMS))
    scores_kernel[math.ceil((stop - first) / group), tiles](
        *(q_THD, weights_TH, keys_SD, *tensors, out, keys_SD.stride(0), columns, *sizes, first, stop, group, floor),
        BLOCK=block,
        EXPLICIT=explicit,
        **_shape(q_THD),
        num_warps=8,
        num_stages=3,
    )


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates: Tensor | Candidates
    ) -> Tensor:
        columns = candidates.shape[1] if isinstance(candidates, Tensor) else candidates.columns
        out_TE = q_THD.new_full((len(q_THD), columns), float("-inf"), dtype=torch.float32)
        if out_TE.numel():
            _score(q_THD, weights_TH, keys_SD, candidates, out_TE, 0, len(q_THD))
        ctx.save_for_backward(q_THD, weights_TH, keys_SD)
        ctx.candidates = candidates
        return out_TE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, weights_TH, keys_SD = ctx.saved_tensors
        dq_THD, dweights_TH = torch.zeros_like(q_THD), torch.zeros_like(weights_TH)
        if gradients[0].numel() == 0:
            return dq_THD, dweights_TH, keys_SD.new_zeros(keys_SD.shape), None
        inputs, results = (q_THD, weights_TH, keys_SD), (dq_THD, dweights_TH)
        slopes_TE = gradients[0].contiguous()
        by_row = isinstance(ctx.candidates, Tensor)
        dkeys_SD = (_row_gradients if by_row else _page_gradients)(inputs, ctx.candidates, slopes_TE, results)
        return dq_THD, dweights_TH, narrow(dkeys_SD, keys_SD), None


def _query_gradients(
    inputs: tuple[Tensor, ...],
    candidates: Tensor | Candidates,
    slopes_TE: Tensor,
    results: tuple[Tensor, ...],
    tokens: range,
    slots: Tensor,
    shares: Tensor,
) -> None:
    q_THD, _, keys_SD = inputs
    (rows, count, sequence, _, pages), sizes = _lookup(candidates)
    query_gradient_kernel[(len(tokens),)](
        *(*inputs, rows, count, sequence, pages, slopes_TE, slots, *results, shares),
        *(keys_SD.stride(0), *sizes, tokens.start),
        BLOCK=_tile(q_THD, 64, 32),
        EXPLICIT=isinstance(candidates, Tensor),
        **_shape(q_THD),
        num_warps=4,
        num_stages=2,
    )


def _page_gradients(
    inputs: tuple[Tensor, ...], candidates: Candidates, slopes_TE: Tensor, results: tuple[Tensor, ...]
) -> Tensor:
    """Writes the gradients of queries and weights, returns that of the keys."""
    q_THD, _, keys_SD = inputs
    _query_gradients(inputs, candidates, slopes_TE, results, range(len(q_THD)), slopes_TE, slopes_TE)
    (_, count, _, starts, pages), sizes = _lookup(candidates)
    block = _tile(q_THD, 128, 32)
    tiles = math.ceil(candidates.columns / block)
    splits = min(16, max(1, 1024 // tiles))
    partials = keys_SD.new_zeros(splits, *keys_SD.shape, dtype=torch.float32)
    key_gradient_kernel[tiles, len(pages), splits](
        *(*inputs, count, starts, pages, slopes_TE, partials, keys_SD.stride(0), *sizes, len(keys_SD), splits),
        BLOCK=block,
        SCAN=1024,
        **_shape(q_THD),
        num_warps=8,
        num_stages=2,
    )
    return partials.sum(0)


def _row_gradients(
    inputs: tuple[Tensor, ...], rows_TE: Tensor, slopes_TE: Tensor, results: tuple[Tensor, ...]
) -> Tensor:
    """The same where each token names its own rows: as many tokens at once as the buffer of shares has room for."""
    keys_SD = inputs[2]
    tokens, columns = rows_TE.shape
    size, dim = keys_SD.shape
    dkeys_SD = keys_SD.new_zeros(size, dim, dtype=torch.float32)
    numbers_S = torch.arange(size + 1, device=rows_TE.device)
    step = max(1, SHARES // (columns * dim))
    shares = keys_SD.new_empty(min(step, tokens) * columns, dim, dtype=torch.float32)
    for first in range(0, tokens, step):
        part = range(first, min(first + step, tokens))
        rows, order = rows_TE[part.start : part.stop].flatten().sort(stable=True)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=order.device)
        _query_gradients(inputs, rows_TE, slopes_TE, results, part, slots, shares)
        bounds = torch.searchsorted(rows, numbers_S)
        padded = max(16, triton.next_power_of_2(dim))
        if size:
            row_sum_kernel[(size,)](shares, bounds, dkeys_SD, dim=dim, DIM=padded, BLOCK=16, num_warps=4)
    return dkeys_SD


def _prepared(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys_SD = keys_SD if keys_SD.stride(1) == 1 else keys_SD.contiguous()
    return q_THD.contiguous(), weights_TH.contiguous(), keys_SD


def index_scores(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates: Tensor | Candidates) -> Tensor:
    """See the op."""
    if isinstance(candidates, Tensor):
        candidates = candidates.long().contiguous()
    return differentiable(_IndexScores, *_prepared(q_THD, weights_TH, keys_SD), candidates)


def index_topk(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates: Candidates, k: int) -> Tensor:
    """See the op. Scores live in a buffer for as many tokens as it has room for."""
    inputs = _prepared(q_THD, weights_TH, keys_SD)
    tokens, columns = len(q_THD), candidates.columns
    chosen_TK = torch.empty(tokens, k, dtype=torch.int64, device=q_THD.device)
    step = max(1, BUFFER // columns)
    scores = q_THD.new_empty(min(step, tokens), columns, dtype=torch.float32)
    for first in range(0, tokens, step):
        stop = min(first + step, tokens)
        _score(*inputs, candidates, scores, first, stop, floor=k)
        select(scores, candidates.count_T, first, chosen_TK[first:stop])
    return chosen_TK
