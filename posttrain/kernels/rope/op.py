"""Partial interleaved rotary embedding: the last channels of a head, neighbouring channels paired."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable, has_kernels, narrow, run
from posttrain.kernels.rope import oracle

cpu = Kernels(__package__)
triton = Kernels(__package__, "triton")


def _rotate(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, backwards: bool) -> Tensor:
    out = torch.empty_like(x)
    heads = math.prod(x.shape[1:-1])
    run(cpu.rotate, x, len(x) * heads, heads, x.shape[-1], cos_TR, sin_TR, cos_TR.shape[1], backwards, out)
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
        return _rotate(gradients[0].contiguous(), cos_TR, sin_TR, not ctx.inverse), None, None, None


def apply_rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the trailing `2R` channels of `x` by the angles of its tokens (V4 report §2.3, "partial RoPE").

    Args:
        x: `[T, ..., D]` with `D >= 2R`; channels `D-2R+2i` and `D-2R+2i+1` make pair `i`.
        cos_TR, sin_TR: `[T, R]`, fp32.
        inverse: rotate back. V4 does this to the attention output, because its keys are its values.
    """
    _, half = expect("apply_rope", "cos", cos_TR, len(x), "R")
    expect("apply_rope", "sin", sin_TR, len(x), half)
    if x.dim() < 2 or x.shape[-1] < 2 * half:
        raise ValueError(f"apply_rope: x has shape {list(x.shape)}; expected [T, ..., at least {2 * half}]")
    if has_kernels(x):
        angles = dense(cos_TR), dense(sin_TR)
        return narrow(differentiable(_Rope, dense(x), *angles, inverse), x)
    if backend_of(x) == "triton":
        return triton.apply_rope(x, cos_TR, sin_TR, inverse)
    return oracle.apply_rope(x, cos_TR, -sin_TR if inverse else sin_TR)
