"""Partial interleaved rotary embedding: the last channels of a head, neighbouring channels paired."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _rotate(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    half = cos_TR.shape[-1]
    shape = (cos_TR.shape[0],) + (1,) * (x.dim() - 2) + (half,)
    cos, sin = cos_TR.view(shape), sin_TR.view(shape)
    out = x.clone()
    even, odd = x[..., -2 * half :: 2].float(), x[..., -2 * half + 1 :: 2].float()
    out[..., -2 * half :: 2] = even * cos - odd * sin
    out[..., -2 * half + 1 :: 2] = odd * cos + even * sin
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return _rotate(x, cos_TR, sin_TR)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return _rotate(gradients[0], cos_TR, -sin_TR), None, None


def apply_rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the trailing `2R` channels of `x` by the angles of its tokens (V4 report §2.3, "partial RoPE").

    Args:
        x: `[T, ..., D]` with `D >= 2R`; channels `D-2R+2i` and `D-2R+2i+1` make pair `i`.
        cos_TR, sin_TR: `[T, R]`, fp32.
        inverse: rotate back. V4 does this to the attention output, because its keys are its values.
    """
    return _Rope.apply(x, cos_TR, -sin_TR if inverse else sin_TR)
