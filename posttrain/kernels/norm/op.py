"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x²) + eps) · w in fp32; `1 / sqrt` because vectorised `rsqrt` is not correctly rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x32 = x.float()
        inverse = (x32.square().mean(-1, keepdim=True) + eps).sqrt_().reciprocal_()
        normed = x32 * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return (normed if weight is None else normed * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, inverse, weight = ctx.saved_tensors
        dtype = gradients[0].dtype
        gradient = gradients[0].float()
        weight_gradient = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                weight_gradient = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
            gradient = gradient * weight.float()
        x_gradient = (gradient - normed * (gradient * normed).mean(-1, keepdim=True)) * inverse
        return x_gradient.to(dtype), weight_gradient, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension, computed in fp32 and returned in `x.dtype`.

    Args:
        x: `[..., D]`.
        weight: `[D]`, or None for the unweighted norm (query heads, mHC input).
    """
    return _RMSNorm.apply(x, weight, eps)
