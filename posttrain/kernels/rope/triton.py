"""`apply_rope` on the GPU: a copy on whose way the last channels are turned."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.compiled import differentiable

TILE = 4096
"""Numbers in one tile of whole heads: 32 for each thread of four warps."""


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    x,
    cos,
    sin,
    out,
    rows,
    heads,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """`ROWS` heads `[REST | HALF pairs]`, by the angles of their tokens or back."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = row[:, None] * (REST + 2 * HALF)
    if REST > 0:
        d = tl.arange(0, BLOCK_REST)
        copied = (row < rows)[:, None] & (d < REST)[None, :]
        tl.store(out + begin + d[None, :], tl.load(x + begin + d[None, :], mask=copied, other=0.0), mask=copied)
    pair = tl.arange(0, BLOCK_HALF)
    angle = (row // heads)[:, None] * HALF + pair[None, :]
    known = (row < rows)[:, None] & (pair < HALF)[None, :]
    c = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
    if BACKWARDS:
        s = -s
    d = tl.arange(0, 2 * BLOCK_HALF)
    inside = (row < rows)[:, None] & (d < 2 * HALF)[None, :]
    value = tl.load(x + begin + REST + d[None, :], mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [ROWS, BLOCK_HALF, 2]))
    turned = tl.join(even * c - odd * s, odd * c + even * s)
    turned = tl.reshape(turned, [ROWS, 2 * BLOCK_HALF])
    tl.store(out + begin + REST + d[None, :], turned.to(out.dtype.element_ty), mask=inside)


def _rotate(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, backwards: bool) -> Tensor:
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dim, half, heads = x.shape[-1], cos_TR.shape[1], math.prod(x.shape[1:-1])
    if x.numel() == 0:
        return out
    if half == 0:
        return out.copy_(x)
    rows, block_half = len(x) * heads, triton.next_power_of_2(half)
    tile_rows = max(TILE // triton.next_power_of_2(dim), 1)
    rotate_kernel[(triton.cdiv(rows, tile_rows),)](
        *(x, cos_TR.contiguous(), sin_TR.contiguous(), out, rows, heads),
        REST=dim - 2 * half,
        HALF=half,
        ROWS=tile_rows,
        BLOCK_REST=triton.next_power_of_2(max(dim - 2 * half, 1)),
        BLOCK_HALF=block_half,
        BACKWARDS=backwards,
        num_warps=4,
    )
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.inverse = inverse
        return _rotate(x, cos_TR, sin_TR, inverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return _rotate(gradients[0], cos_TR, sin_TR, not ctx.inverse), None, None, None


def apply_rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> Tensor:
    """`[T, ..., D]` with its trailing pairs turned in fp32, in `x.dtype`."""
    return differentiable(_Rope, x, cos_TR, sin_TR, inverse)
