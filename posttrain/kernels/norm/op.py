"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable, has_kernels, narrow, run
from posttrain.kernels.norm import oracle

cpu = Kernels(__package__)
triton = Kernels(__package__, "triton")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        dim, out = x.shape[-1], torch.empty_like(x)
        inverse = x.new_empty(x.shape[:-1]) if any(ctx.needs_input_grad) else None
        run(cpu.forward, x, weight, x.numel() // dim, dim, eps, out, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), None if weight is None else torch.zeros_like(weight)
        run(cpu.backward, x, weight, inverse, inverse.numel(), x.shape[-1], gradients[0].contiguous(), dx, dweight)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension, computed in fp32 and returned in `x.dtype`.

    Args:
        x: `[..., D]`.
        weight: `[D]`, or None for the unweighted norm (query heads).
    """
    if weight is not None:
        expect("rms_norm", "weight", weight, x.shape[-1])
    if has_kernels(x):
        return narrow(differentiable(_RMSNorm, dense(x), weight if weight is None else dense(weight), eps), x)
    if backend_of(x) == "triton":
        return triton.rms_norm(x, weight, eps)
    return oracle.rms_norm(x, weight, eps)
