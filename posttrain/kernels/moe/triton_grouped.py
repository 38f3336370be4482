"""Grouped matrix products of the experts on the GPU: many small products, one for each expert that has rows.

A program computes tiles of one expert's product, `TURNS` of them one after the other: what it looks up about its rows
serves them all. An output is one fp32 sum over the inner dimension from its start to its end in steps of the same
instruction: neither the tile it falls into nor the tile's other rows change a bit.

Letters: `S` rows sorted by expert (see `triton_plan`), `H` hidden, `I` inner, `J = 2I`. `SLOTS` is the number of slots
of a token; 0 means that rows are the tokens themselves, all of one expert.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from posttrain.kernels.moe.triton_plan import find_tile


@triton.jit
def slots_of(order, row, valid, SLOTS: tl.constexpr):
    """Slot of each row."""
    if SLOTS == 0:
        slot = row.to(tl.int64)
    else:
        slot = tl.load(order + row, mask=valid, other=0).to(tl.int64)
    return slot


@triton.jit
def tokens_of(slot, SLOTS: tl.constexpr):
    """Token of each slot."""
    if SLOTS == 0:
        token = slot
    else:
        token = slot // SLOTS
    return token


@triton.jit
def swiglu(gate, up, limit):
    """`silu(min(gate, limit)) · clamp(up, ±limit)`."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _left(rows_at, valid, start, INNER: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr):
    """`[M, K]` of rows that stand anywhere."""
    k = start + tl.arange(0, BLOCK_K)
    if INNER % BLOCK_K == 0:
        tile = tl.load(rows_at[:, None] + k[None, :], mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(rows_at[:, None] + k[None, :], mask=valid[:, None] & (k < INNER)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _right(
    matrices,
    first,
    start,
    column,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`[K, N]` of the matrix that begins in row `first`; transposed, it is stored as `[N, K]`."""
    if DESCRIBED:
        if TRANSPOSED:
            tile = tl.trans(matrices.load([first + column, start]))
        else:
            tile = matrices.load([first + start, column])
    else:
        k, n = start + tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_N)
        if TRANSPOSED:
            at = matrices + first.to(tl.int64) * INNER + n[None, :] * INNER + k[:, None]
        else:
            at = matrices + first.to(tl.int64) * OUTER + k[:, None] * OUTER + n[None, :]
        if INNER % BLOCK_K == 0 and OUTER % BLOCK_N == 0:
            tile = tl.load(at)
        elif INNER % BLOCK_K == 0:
            tile = tl.load(at, mask=(n < OUTER)[None, :], other=0.0)
        else:
            tile = tl.load(at, mask=(k < INNER)[:, None] & (n < OUTER)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def gate_up_kernel(
    x_TH,
    w13_EJH,
    hidden_SJ,
    act_SI,
    order,
    starts,
    tile_starts,
    tile_experts,
    limit,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    TURNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """`act[s] = silu(min(gate, limit)) · clamp(up, ±limit)`, gate and up being `x[token of s] · w13ᵀ`.

    If `KEEP`, `hidden` gets gate and up, with what a clamp has cut replaced by an infinity: rounding to bf16
    cannot then move a value to the other side of the limit, and the gradient is cut where the result was.
    """
    COLUMNS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = (COLUMNS + TURNS - 1) // TURNS
    place = tl.program_id(0)
    expert = tl.load(tile_experts + place // PARTS)
    if expert == EXPERTS:
        return
    first, end, part = find_tile(starts, tile_starts, expert, place, BLOCK_M, PARTS, BAND)
    local = tl.arange(0, BLOCK_M)
    row = first + local
    valid = row < end
    rows_at = x_TH + tokens_of(slots_of(order, row, valid, SLOTS), SLOTS) * HIDDEN
    gate_at = expert * (2 * INNER)
    for column in range(part * TURNS, tl.minimum(COLUMNS, (part + 1) * TURNS)):
        n0 = column * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            a = _left(rows_at, valid, start, HIDDEN, BLOCK_K, WIDEN)
            b = _right(w13_EJH, gate_at, start, n0, HIDDEN, INNER, BLOCK_K, BLOCK_N, True, DESCRIBED, WIDEN)
            c = _right(w13_EJH, gate_at + INNER, start, n0, HIDDEN, INNER, BLOCK_K, BLOCK_N, True, DESCRIBED, WIDEN)
            gate = tl.dot(a, b, gate, input_precision="ieee")
            up = tl.dot(a, c, up, input_precision="ieee")
        mask = valid[:, None]
        if INNER % BLOCK_N != 0:
            mask = mask & (n0 + tl.arange(0, BLOCK_N) < INNER)[None, :]
        if KEEP:
            hidden_at = hidden_SJ + (first.to(tl.int64) * (2 * INNER) + n0)
            at = local[:, None] * (2 * INNER) + tl.arange(0, BLOCK_N)[None, :]
            kept_gate = tl.where(gate > limit, float("inf"), gate)
            kept_up = tl.where(up > limit, float("inf"), tl.where(up < -limit, float("-inf"), up))
            tl.store(hidden_at + at, kept_gate.to(hidden_SJ.dtype.element_ty), mask=mask)
            tl.store(hidden_at + INNER + at, kept_up.to(hidden_SJ.dtype.element_ty), mask=mask)
        act = swiglu(gate, up, limit)
        act_at = act_SI + (first.to(tl.int64) * INNER + n0)
        at = local[:, None] * INNER + tl.arange(0, BLOCK_N)[None, :]
        tl.store(act_at + at, act.to(act_SI.dtype.element_ty), mask=mask)


@triton.jit
def multiply_kernel(
    rows_SK,
    matrices,
    out,
    order,
    starts,
    tile_starts,
    tile_experts,
    first_column,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    TURNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """`out[slot of s] = rows[s] · matrix`, or `BY_TOKEN`, `out[s] = rows[token of s] · matrix`.

    Of the product, `WIDTH` columns from `first_column` on. Transposed, matrices are `[E, OUTER, INNER]`, else
    `[E, INNER, OUTER]`.
    """
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = (COLUMNS + TURNS - 1) // TURNS
    place = tl.program_id(0)
    expert = tl.load(tile_experts + place // PARTS)
    if expert == EXPERTS:
        return
    first, end, part = find_tile(starts, tile_starts, expert, place, BLOCK_M, PARTS, BAND)
    row = first + tl.arange(0, BLOCK_M)
    valid = row < end
    slot = slots_of(order, row, valid, SLOTS)
    rows_at = rows_SK + (tokens_of(slot, SLOTS) if BY_TOKEN else row.to(tl.int64)) * INNER
    out_at = out + (row.to(tl.int64) if BY_TOKEN else slot) * WIDTH
    matrix_at = expert * (OUTER if TRANSPOSED else INNER)
    for column in range(part * TURNS, tl.minimum(COLUMNS, (part + 1) * TURNS)):
        n0 = column * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, INNER, BLOCK_K):
            a = _left(rows_at, valid, start, INNER, BLOCK_K, WIDEN)
            b = _right(
                *(matrices, matrix_at, start, first_column + n0),
                *(INNER, OUTER, BLOCK_K, BLOCK_N, TRANSPOSED, DESCRIBED, WIDEN),
            )
            sums = tl.dot(a, b, sums, input_precision="ieee")
        n = n0 + tl.arange(0, BLOCK_N)
        mask = valid[:, None] & (n < WIDTH)[None, :]
        tl.store(out_at[:, None] + n[None, :], sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    rows,
    weights,
    experts_TK,
    out,
    first_column,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A token's slots added up in their order, in fp32: `WIDTH` columns of `out` from `first_column` on.

    A slot whose expert does not exist makes its token NaN.
    """
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(SLOTS):
        slot = token * SLOTS + place
        expert = tl.load(experts_TK + slot)
        exists = (expert >= 0) & (expert < EXPERTS)
        row = tl.load(rows + slot * WIDTH + n, mask=(n < WIDTH) & exists, other=float("nan")).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights + slot)
        sums += row
    tl.store(out + token * DIM + first_column + n, sums.to(out.dtype.element_ty), mask=n < WIDTH)
