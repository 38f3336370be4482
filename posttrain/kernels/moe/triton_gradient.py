"""Gradients of the experts on the GPU that are not a product of rows with a matrix: SwiGLU's, and the matrices' own."""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from posttrain.kernels.moe.triton_grouped import slots_of, tokens_of


@triton.jit(do_not_specialize=["rows"])
def swiglu_gradient_kernel(
    hidden_SJ,
    weights,
    dhidden_SJ,
    act_SI,
    dweights,
    order,
    starts,
    rows,
    limit,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Back through SwiGLU: of each row, `act` holds `dact = gradient[token of s] · w2` before, and then

    - `dhidden` has its gradient, scaled by the slot's weight; it may be the memory of `hidden`,
    - `act` has the activations, computed again and scaled by the weight: what the gradient of `w2` needs,
    - `dweights[slot] = act · dact` is the weight's gradient; NaN where the slot's expert does not exist.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    if SLOTS > 0:
        slot = tl.load(order + row, mask=valid, other=0)
        exists = (row >= tl.load(starts)) & (row < tl.load(starts + EXPERTS))
        weight = tl.load(weights + slot, mask=valid, other=0.0)[:, None]
    act_at = act_SI + row.to(tl.int64)[:, None] * INNER
    hidden_at = hidden_SJ + row.to(tl.int64)[:, None] * (2 * INNER)
    dhidden_at = dhidden_SJ + row.to(tl.int64)[:, None] * (2 * INNER)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, INNER, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N))[None, :]
        mask = (exists if SLOTS > 0 else valid)[:, None] & (n < INNER)
        slope = tl.load(act_at + n, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(hidden_at + n, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(hidden_at + INNER + n, mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()  # between what some threads read and what others write in its place
        gate_cut, up_cut = gate == float("inf"), tl.abs(up) == float("inf")
        gate = tl.where(gate_cut, limit, gate)
        up = tl.where(up_cut, tl.where(up > 0, limit, -limit), up)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        act = gate * sigmoid * up
        if SLOTS > 0:
            sums += tl.sum(act * slope, 1)
            slope *= weight
            act *= weight
        tl.store(act_at + n, act.to(act_SI.dtype.element_ty), mask=mask)
        dgate = tl.where(gate_cut, 0.0, slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        tl.store(dhidden_at + n, dgate.to(dhidden_SJ.dtype.element_ty), mask=mask)
        dup = tl.where(up_cut, 0.0, slope * gate * sigmoid)
        tl.store(dhidden_at + INNER + n, dup.to(dhidden_SJ.dtype.element_ty), mask=mask)
    if SLOTS > 0:
        tl.store(dweights + slot, tl.where(exists, sums, float("nan")), mask=valid)


@triton.jit
def _rows_of(values, row, valid, order, column, WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """`[K, BLOCK]` columns of rows; with `SLOTS`, of the rows' tokens."""
    n = column + tl.arange(0, BLOCK)
    at = values + tokens_of(slots_of(order, row, valid, SLOTS), SLOTS)[:, None] * WIDTH + n[None, :]
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
    described,
    order,
    starts,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT_SLOTS: tl.constexpr,
    RIGHT_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TURNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ADD: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """`out[e] = leftᵀ · right` over the rows of expert `e` in their order; zeros where it has none.

    `ADD`: what is there is added to the sum before it is rounded. (The copy engine can add in memory, but takes longer
    for bf16 than reading and storing do: docs/kernels/moe.md.) `DESCRIBED`: `described` is `out` for the copy engine.

    A side with slots is `[T, width]` and read by token, the other is `[S, width]`. A program computes `TURNS` tiles
    beside one another. The copy engine stores one while the next one is computed: an expert's sums are so short
    (three or four steps of 64 rows where it has 192) that storing takes as long as computing.
    """
    ROWS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = (COLUMNS + TURNS - 1) // TURNS
    expert = tl.program_id(0) // (ROWS * PARTS)
    m0 = tl.program_id(0) // PARTS % ROWS * BLOCK_M
    part = tl.program_id(0) % PARTS
    begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    steps = tl.maximum(tl.cdiv(end - begin, BLOCK_K), 1)
    turns = tl.minimum(COLUMNS - part * TURNS, TURNS)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One loop over the steps of all tiles, so that the next tile's first rows are on their way while this one ends.
    for turn_step in range(turns * steps):
        n0 = (part * TURNS + turn_step // steps) * BLOCK_N
        step = turn_step % steps
        row = begin + step * BLOCK_K + tl.arange(0, BLOCK_K)
        valid = row < end
        a = _rows_of(left, row, valid, order, m0, M, LEFT_SLOTS, BLOCK_M)
        b = _rows_of(right, row, valid, order, n0, N, RIGHT_SLOTS, BLOCK_N)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if step == 0:
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
        if step == steps - 1:
            m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
            at = out_EMN + expert.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
            mask = (m < M)[:, None] & (n < N)[None, :]
            if ADD:
                sums += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if DESCRIBED:
                described.store([expert * M + m0, n0], sums.to(described.dtype))
            else:
                tl.store(at, sums.to(out_EMN.dtype.element_ty), mask=mask)
