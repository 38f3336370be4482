"""Experts in MXFP4 on the GPU, for sampling: half a byte is read for a number where bf16 takes two.

The products are those of `triton_grouped`, turned round: matrix times rows, so that the matrix, widened in registers,
is the operand that the tensor cores take from there, and a tile need not have more rows than an expert has in a
decoding step. MXFP4 numbers are bf16 numbers, and each output is the same sum in the same steps, so the bits are those
of the matrices in bf16 (`tests/test_triton_moe.py` holds them against each other on a GPU).

A matrix is rows of `quant.op.pack_rows_mxfp4`: of each row the codes, then the scales. Letters as in `triton_grouped`.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.moe.triton_grouped import slots_of, swiglu, tokens_of
from posttrain.kernels.moe.triton_plan import Plan, find_tile, make_plan
from posttrain.kernels.moe.triton_route import INTERPRETED
from posttrain.kernels.quant.triton import decode, power


@triton.jit
def _widened(codes, scales, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BF16: tl.constexpr):
    """Numbers `[N, K]` of codes `[N, K / 2]` and scales `[N, K / 32]`."""
    if BF16:
        # Sign and magnitude moved to bf16's places are the number times 2^-126, subnormal ones included.
        pair = codes.to(tl.int16)
        low = ((pair & 0x07) << 6) | ((pair & 0x08) << 12)
        high = ((pair & 0x70) << 2) | ((pair & 0x80) << 8)
        numbers = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K // 32, 32)).to(tl.bfloat16, bitcast=True)
        lift = tl.full((1,), 253 << 7, tl.int16).to(tl.bfloat16, bitcast=True)
        scale = (scales.to(tl.int16) << 7).to(tl.bfloat16, bitcast=True)
        numbers = numbers * lift[None, None, :] * scale[:, :, None]
    else:
        pair = codes.to(tl.int32)
        four_bits = tl.reshape(tl.join(pair & 15, pair >> 4), (BLOCK_N, BLOCK_K // 32, 32))
        numbers = decode(four_bits, 1, 1, 3) * power(scales.to(tl.int32))[:, :, None]
    return tl.reshape(numbers, (BLOCK_N, BLOCK_K))


@triton.jit
def _matrix(
    matrices,
    first,
    start,
    column,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BF16: tl.constexpr,
):
    """`[N, K]` of the matrix whose first row is row `first`."""
    n = column + tl.arange(0, BLOCK_N)
    rows_at = matrices + (first + n).to(tl.int64)[:, None] * (INNER // 2 + INNER // 32)
    pair = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    group = start // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
    if INNER % BLOCK_K == 0 and OUTER % BLOCK_N == 0:
        codes = tl.load(rows_at + pair)
        scales = tl.load(rows_at + INNER // 2 + group)
    else:
        exists = (n < OUTER)[:, None]
        codes = tl.load(rows_at + pair, mask=exists & (pair < INNER // 2), other=0)
        scales = tl.load(rows_at + INNER // 2 + group, mask=exists & (group < INNER // 32), other=127)
    return _widened(codes, scales, BLOCK_N, BLOCK_K, BF16)


@triton.jit
def _rows(rows_at, valid, start, INNER: tl.constexpr, BLOCK_K: tl.constexpr, BF16: tl.constexpr):
    """`[K, M]` of rows that stand anywhere."""
    k = start + tl.arange(0, BLOCK_K)
    if INNER % BLOCK_K == 0:
        tile = tl.load(rows_at[None, :] + k[:, None], mask=valid[None, :], other=0.0)
    else:
        tile = tl.load(rows_at[None, :] + k[:, None], mask=valid[None, :] & (k < INNER)[:, None], other=0.0)
    return tile if BF16 else tile.to(tl.float32)


@triton.jit
def gate_up_kernel(
    x_TH,
    w13,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """As `triton_grouped.gate_up_kernel`, which says what `act` is."""
    PARTS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    place = tl.program_id(0)
    expert = tl.load(tile_experts + place // PARTS)
    if expert == EXPERTS:
        return
    first, end, part = find_tile(starts, tile_starts, expert, place, BLOCK_M, PARTS, BAND)
    row = first + tl.arange(0, BLOCK_M)
    valid = row < end
    rows_at = x_TH + tokens_of(slots_of(order, row, valid, SLOTS), SLOTS) * HIDDEN
    gate_at, n0 = expert * (2 * INNER), part * BLOCK_N
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        x = _rows(rows_at, valid, start, HIDDEN, BLOCK_K, BF16)
        a = _matrix(w13, gate_at, start, n0, HIDDEN, INNER, BLOCK_N, BLOCK_K, BF16)
        b = _matrix(w13, gate_at + INNER, start, n0, HIDDEN, INNER, BLOCK_N, BLOCK_K, BF16)
        gate = tl.dot(a, x, gate, input_precision="ieee")
        up = tl.dot(b, x, up, input_precision="ieee")
    act = swiglu(gate, up, limit)
    n = n0 + tl.arange(0, BLOCK_N)
    at = act_SI + row.to(tl.int64)[None, :] * INNER + n[:, None]
    tl.store(at, act.to(act_SI.dtype.element_ty), mask=valid[None, :] & (n < INNER)[:, None])


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """`out[slot of s]`: `WIDTH` columns from `first_column` on of row `s` times its matrix `[OUTER, INNER]`."""
    PARTS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    place = tl.program_id(0)
    expert = tl.load(tile_experts + place // PARTS)
    if expert == EXPERTS:
        return
    first, end, part = find_tile(starts, tile_starts, expert, place, BLOCK_M, PARTS, BAND)
    row = first + tl.arange(0, BLOCK_M)
    valid = row < end
    rows_at = rows_SK + row.to(tl.int64) * INNER
    n0 = part * BLOCK_N
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, INNER, BLOCK_K):
        x = _rows(rows_at, valid, start, INNER, BLOCK_K, BF16)
        a = _matrix(
            *(matrices, expert * OUTER, start, first_column + n0),
            *(INNER, OUTER, BLOCK_N, BLOCK_K, BF16),
        )
        sums = tl.dot(a, x, sums, input_precision="ieee")
    n = n0 + tl.arange(0, BLOCK_N)
    at = out + slots_of(order, row, valid, SLOTS)[None, :] * WIDTH + n[:, None]
    tl.store(at, sums.to(out.dtype.element_ty), mask=valid[None, :] & (n < WIDTH)[:, None])


@dataclass(frozen=True)
class Sizes:
    """A tile: rows of an expert, rows and columns of its matrix at a time, and how they are computed."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def fitted(self, columns: int, inner: int) -> dict[str, int]:
        """A kernel's arguments, no larger than these sizes need. The number of tokens changes none of them."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": min(self.columns, max(64, triton.next_power_of_2(columns))),
            "BLOCK_K": min(self.inner, triton.next_power_of_2(inner)),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# As in `triton`, the choice by the number of tokens changes no bit: all of bf16 are the same steps of 16 terms.
BAND = 8
SIZES = {
    "few": Sizes(16, 64, 64, 4, 4),
    "small": Sizes(32, 64, 64, 4, 3),
    "medium": Sizes(64, 64, 64, 4, 3),
    "large": Sizes(128, 128, 64, 8, 3),
    "single": Sizes(32, 64, 32, 4, 2),
}


ROWS = {"few": 8, "small": 24, "medium": 96}
"""Up to how many rows an expert has on average."""


def packed_plan(x_TH: Tensor, experts_TK: Tensor, experts: int) -> Plan:
    """The plan of at least one slot."""
    rows = experts_TK.numel() / experts
    which = next((name for name, most in ROWS.items() if rows <= most), "large")
    which = "single" if x_TH.dtype is torch.float32 else which
    return make_plan(experts_TK, experts, which, SIZES[which].rows)


def packed_gate_up(x_TH: Tensor, w13: Tensor, plan: Plan, limit: float) -> Tensor:
    """`act[S, I]`."""
    (experts, outer, _), hidden = w13.shape, x_TH.shape[1]
    act_SI = x_TH.new_empty(len(plan.order_S), outer // 2)
    sizes = SIZES[plan.tiles].fitted(outer // 2, hidden)
    gate_up_kernel[(len(plan.tile_experts_N) * triton.cdiv(outer // 2, sizes["BLOCK_N"]),)](
        *(x_TH, w13, act_SI, *plan.tables, limit),
        HIDDEN=hidden,
        INNER=outer // 2,
        EXPERTS=experts,
        SLOTS=plan.slots,
        BAND=BAND,
        BF16=x_TH.dtype is torch.bfloat16 and not INTERPRETED,
        **sizes,
    )
    return act_SI


def packed_multiply(rows_SK: Tensor, matrices: Tensor, plan: Plan, columns: slice) -> Tensor:
    """Columns of each row times its expert's matrix, in slots' order."""
    (experts, outer, _), inner, width = matrices.shape, rows_SK.shape[1], columns.stop - columns.start
    out = rows_SK.new_empty(len(rows_SK), width)
    sizes = SIZES[plan.tiles].fitted(width, inner)
    multiply_kernel[(len(plan.tile_experts_N) * triton.cdiv(width, sizes["BLOCK_N"]),)](
        *(rows_SK, matrices, out, *plan.tables, columns.start),
        INNER=inner,
        OUTER=outer,
        WIDTH=width,
        EXPERTS=experts,
        SLOTS=plan.slots,
        BAND=BAND,
        BF16=rows_SK.dtype is torch.bfloat16 and not INTERPRETED,
        **sizes,
    )
    return out
