"""`apply_rope` on the GPU: a copy on whose way the last channels are turned."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.compiled import differentiable
from posttrain.kernels.launches import Launcher

TILE = 4096
"""Numbers in one tile of whole heads: 32 for each thread of four warps."""


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    x,
    cos,
    sin,
    out,
    rows,
    HEADS: tl.constexpr,
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
    angle = (row // HEADS)[:, None] * HALF + pair[None, :]
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


rotate = Launcher(rotate_kernel)


@lru_cache
def _constants(heads: int, dim: int, half: int, backwards: bool) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "REST": dim - 2 * half,
        "HALF": half,
        "ROWS": max(TILE // triton.next_power_of_2(dim), 1),
        "BLOCK_REST": triton.next_power_of_2(max(dim - 2 * half, 1)),
        "BLOCK_HALF": triton.next_power_of_2(half),
        "BACKWARDS": backwards,
    }


def _aligned(tensor: Tensor) -> Tensor:
    """Without gaps, and begun where the widest loads may begin."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _rotate(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, backwards: bool) -> Tensor:
    x, cos_TR, sin_TR = _aligned(x), _aligned(cos_TR), _aligned(sin_TR)
    out, (dim, half) = torch.empty_like(x), (x.shape[-1], cos_TR.shape[1])
    if out.numel() == 0:
        return out
    if half == 0:
        return out.copy_(x)
    rows = x.numel() // dim
    constants = _constants(rows // len(x), dim, half, backwards)
    key = x.device, x.dtype, cos_TR.dtype, sin_TR.dtype, rows // len(x), dim, half, backwards
    rotate((-(-rows // constants["ROWS"]), 1, 1), key, (x, cos_TR, sin_TR, out, rows), constants, num_warps=4)
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
