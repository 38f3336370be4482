"""Grouped matrix products of the experts on the GPU: many small products, one for each expert that has rows.

A program computes one tile of one expert's product. An output is one fp32 sum over the inner dimension from its start
to its end in steps of the same instruction: neither the tile it falls into nor the tile's other rows change a bit.

Letters: `S` rows sorted by expert (see `triton_plan`), `H` hidden, `I` inner, `J = 2I`. `SLOTS` is the number of slots
of a token; 0 means that rows are the tokens themselves, all of one expert.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from posttrain.kernels.moe.triton_plan import find_tile


@triton.jit
def _slots(order, row, valid, SLOTS: tl.constexpr):
    """Slot of each row."""
    if SLOTS == 0:
        slot = row.to(tl.int64)
    else:
        slot = tl.load(order + row, mask=valid, other=0).to(tl.int64)
    return slot


@triton.jit
def _tokens(slot, SLOTS: tl.constexpr):
    """Token of each slot."""
    if SLOTS == 0:
        token = slot
    else:
        token = slot // SLOTS
    return token


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
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """`act[s] = silu(min(gate, limit)) · clamp(up, ±limit)`, gate and up being `x[token of s] · w13ᵀ`.

    If `KEEP`, `hidden` gets gate and up, with what a clamp has cut replaced by an infinity: rounding to bf16
    cannot then move a value to the other side of the limit, and the gradient is cut where the result was.
    """
    COLUMNS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    place = tl.program_id(0)
    expert = tl.load(tile_experts + place // COLUMNS)
    if expert == EXPERTS:
        return
    first, end, column = find_tile(starts, tile_starts, expert, place, BLOCK_M, COLUMNS, BAND)
    local = tl.arange(0, BLOCK_M)
    row = first + local
    valid = row < end
    token = _tokens(_slots(order, row, valid, SLOTS), SLOTS)
    rows_at = x_TH + token * HIDDEN
    gate_at, n0 = expert * (2 * INNER), column * BLOCK_N
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        a = _left(rows_at, valid, start, HIDDEN, BLOCK_K, WIDEN)
        b = _right(w13_EJH, gate_at, start, n0, HIDDEN, INNER, BLOCK_K, BLOCK_N, True, DESCRIBED, WIDEN)
        c = _right(w13_EJH, gate_at + INNER, start, n0, HIDDEN, INNER, BLOCK_K, BLOCK_N, True, DESCRIBED, WIDEN)
        gate = tl.dot(a, b, gate, input_precision="ieee")
        up = tl.dot(a, c, up, input_precision="ieee")
    n = n0 + tl.arange(0, BLOCK_N)
    mask = valid[:, None] & (n < INNER)[None, :]
    if KEEP:
        hidden_at = hidden_SJ + first.to(tl.int64) * (2 * INNER) + (local[:, None] * (2 * INNER) + n[None, :])
        kept_gate = tl.where(gate > limit, float("inf"), gate)
        kept_up = tl.where(up > limit, float("inf"), tl.where(up < -limit, float("-inf"), up))
        tl.store(hidden_at, kept_gate.to(hidden_SJ.dtype.element_ty), mask=mask)
        tl.store(hidden_at + INNER, kept_up.to(hidden_SJ.dtype.element_ty), mask=mask)
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    act = gate / (1.0 + tl.exp(-gate)) * up
    act_at = act_SI + first.to(tl.int64) * INNER + (local[:, None] * INNER + n[None, :])
    tl.store(act_at, act.to(act_SI.dtype.element_ty), mask=mask)


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """`out[slot of s] = rows[s] · matrix`, `WIDTH` columns of it from `first_column` on.

    Transposed, matrices are `[E, OUTER, INNER]`, else `[E, INNER, OUTER]`.
    """
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    place = tl.program_id(0)
    expert = tl.load(tile_experts + place // COLUMNS)
    if expert == EXPERTS:
        return
    first, end, column = find_tile(starts, tile_starts, expert, place, BLOCK_M, COLUMNS, BAND)
    row = first + tl.arange(0, BLOCK_M)
    valid = row < end
    slot = _slots(order, row, valid, SLOTS)
    rows_at = rows_SK + row.to(tl.int64) * INNER
    n0 = column * BLOCK_N
    matrix_at = expert * (OUTER if TRANSPOSED else INNER)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INNER, BLOCK_K):
        a = _left(rows_at, valid, start, INNER, BLOCK_K, WIDEN)
        b = _right(
            matrices, matrix_at, start, first_column + n0, INNER, OUTER, BLOCK_K, BLOCK_N, TRANSPOSED, DESCRIBED, WIDEN
        )
        sums = tl.dot(a, b, sums, input_precision="ieee")
    n = n0 + tl.arange(0, BLOCK_N)
    mask = valid[:, None] & (n < WIDTH)[None, :]
    tl.store(out + slot[:, None] * WIDTH + n[None, :], sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots"])
def act_gradient_kernel(
    gradient_TH,
    w2_EHI,
    hidden_SJ,
    weights,
    dhidden_SJ,
    act_SI,
    dweights,
    order,
    starts,
    tile_starts,
    tile_experts,
    slots,
    limit,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    PART: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Back through the second product and SwiGLU: `dact = gradient[token of s] · w2`, and from it

    - `dhidden`, scaled by the slot's weight; it may be the memory of `hidden`,
    - `act`, computed again and scaled by the weight: what the gradient of `w2` needs,
    - `dweights[column, slot]`, this tile's columns of `act · dact`: their sum over tiles is the weight's gradient.
    """
    COLUMNS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    place = tl.program_id(0)
    expert = tl.load(tile_experts + place // COLUMNS)
    if expert == EXPERTS:
        return
    first, end, column = find_tile(starts, tile_starts, expert, place, BLOCK_M, COLUMNS, BAND)
    local = tl.arange(0, BLOCK_M)
    row = first + local
    valid = row < end
    slot = _slots(order, row, valid, SLOTS)
    rows_at = gradient_TH + _tokens(slot, SLOTS) * HIDDEN
    n0 = column * BLOCK_N
    dact = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        a = _left(rows_at, valid, start, HIDDEN, BLOCK_K, WIDEN)
        b = _right(
            w2_EHI, expert * HIDDEN, start, n0, HIDDEN, INNER, BLOCK_K, BLOCK_N, False, DESCRIBED, WIDEN
        )  # fmt: skip
        dact = tl.dot(a, b, dact, input_precision="ieee")
    # SwiGLU's gradient needs seven numbers for each output: too many for the registers that hold a whole tile. So the
    # tile goes to where `act` will be, and comes back from the cache in parts. A barrier stands between what some
    # threads read and what others write in its place.
    n = n0 + tl.arange(0, BLOCK_N)
    act_at = act_SI + first.to(tl.int64) * INNER + local[:, None] * INNER
    tl.store(act_at + n[None, :], dact.to(act_SI.dtype.element_ty), mask=valid[:, None] & (n < INNER)[None, :])
    tl.debug_barrier()
    hidden_at = hidden_SJ + first.to(tl.int64) * (2 * INNER)
    dhidden_at = dhidden_SJ + first.to(tl.int64) * (2 * INNER)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.range(0, BLOCK_N, PART, num_stages=1):
        c = n0 + part + tl.arange(0, PART)
        mask = valid[:, None] & (c < INNER)[None, :]
        at = local[:, None] * (2 * INNER) + c[None, :]
        slope = tl.load(act_at + c[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(hidden_at + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(hidden_at + INNER + at, mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()
        gate_cut, up_cut = gate == float("inf"), tl.abs(up) == float("inf")
        gate = tl.where(gate_cut, limit, gate)
        up = tl.where(up_cut, tl.where(up > 0, limit, -limit), up)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        act = gate * sigmoid * up
        if SLOTS > 0:
            sums += tl.sum(act * slope, 1)
            weight = tl.load(weights + slot, mask=valid, other=0.0)
            slope *= weight[:, None]
            act *= weight[:, None]
        tl.store(act_at + c[None, :], act.to(act_SI.dtype.element_ty), mask=mask)
        dgate = tl.where(gate_cut, 0.0, slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        tl.store(dhidden_at + at, dgate.to(dhidden_SJ.dtype.element_ty), mask=mask)
        dup = tl.where(up_cut, 0.0, slope * gate * sigmoid)
        tl.store(dhidden_at + INNER + at, dup.to(dhidden_SJ.dtype.element_ty), mask=mask)
    if SLOTS > 0:
        tl.store(dweights + column.to(tl.int64) * slots + slot, sums, mask=valid)


@triton.jit
def _rows_of(values, row, valid, order, column, WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """`[K, BLOCK]` columns of rows; with `SLOTS`, of the rows' tokens."""
    n = column + tl.arange(0, BLOCK)
    at = values + _tokens(_slots(order, row, valid, SLOTS), SLOTS)[:, None] * WIDTH + n[None, :]
    if WIDTH % BLOCK == 0:
        tile = tl.load(at, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=valid[:, None] & (n < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def weight_gradient_kernel(
    left,
    right,
    out_EMN,
    order,
    starts,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT_SLOTS: tl.constexpr,
    RIGHT_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """`out[e] = leftᵀ · right` over the rows of expert `e` in their order; zeros where it has none.

    A side with slots is `[T, width]` and read by token, the other is `[S, width]`.
    """
    ROWS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (ROWS * COLUMNS)
    local = tl.program_id(0) % (ROWS * COLUMNS)
    band = local // (BAND * COLUMNS) * BAND
    height = tl.minimum(ROWS - band, BAND)
    m0 = (band + local % (BAND * COLUMNS) % height) * BLOCK_M
    n0 = local % (BAND * COLUMNS) // height * BLOCK_N
    begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        valid = row < end
        a = _rows_of(left, row, valid, order, m0, M, LEFT_SLOTS, BLOCK_M)
        b = _rows_of(right, row, valid, order, n0, N, RIGHT_SLOTS, BLOCK_N)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    at = out_EMN + expert.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
    tl.store(at, sums.to(out_EMN.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


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
