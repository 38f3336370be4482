"""Sinkhorn normalisation of the mHC mixing matrices: a compiled CPU kernel, and plain torch elsewhere.

Forty tiny normalisations in torch cost more in launches than in arithmetic and would dominate a decode
step of a small model, so the CPU runs them in one loop nest (numba, which vLLM depends on anyway). numba is imported
at the first call, not with the module: vLLM 0.32 walks every loaded module when a CPU worker starts and
fails on an object of llvmlite's (`vllm.triton_utils.dispatcher._rebind_kernels`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class _CompiledSinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix_TNN: Tensor, iterations: int, eps: float) -> Tensor:
        matrix_TNN = matrix_TNN.contiguous()
        from posttrain.kernels.mhc import sinkhorn_cpu

        out = torch.empty_like(matrix_TNN)
        n = matrix_TNN.shape[-1]
        flat = matrix_TNN.detach().view(-1, n * n).numpy()
        sinkhorn_cpu.forward(flat, out.view(-1, n * n).numpy(), n, iterations, np.float32(eps))
        ctx.save_for_backward(matrix_TNN)
        ctx.iterations, ctx.eps = iterations, eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        from posttrain.kernels.mhc import sinkhorn_cpu

        (matrix_TNN,) = ctx.saved_tensors
        n = matrix_TNN.shape[-1]
        out = torch.empty_like(matrix_TNN)
        sinkhorn_cpu.backward(
            matrix_TNN.detach().view(-1, n * n).numpy(),
            gradients[0].contiguous().view(-1, n * n).numpy(),
            out.view(-1, n * n).numpy(),
            n,
            ctx.iterations,
            np.float32(ctx.eps),
        )
        return out, None, None


def sinkhorn_oracle(matrix_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """The same in plain torch: columns, then `iterations - 1` times rows and columns."""
    matrix_TNN = matrix_TNN / (matrix_TNN.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix_TNN = matrix_TNN / (matrix_TNN.sum(-1, keepdim=True) + eps)
        matrix_TNN = matrix_TNN / (matrix_TNN.sum(-2, keepdim=True) + eps)
    return matrix_TNN


def sinkhorn(matrix_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """Make positive matrices doubly stochastic (V4 report eq. 8), ending on columns as the released code does.

    Args:
        matrix_TNN: `[T, n, n]` positive, fp32.
        iterations: pairs of a row and a column normalisation; the first pair has no row half (its rows come
            normalised from a softmax).
        eps: added to each sum.
    """
    if matrix_TNN.device.type == "cpu" and matrix_TNN.dtype == torch.float32:
        return _CompiledSinkhorn.apply(matrix_TNN, iterations, eps)
    return sinkhorn_oracle(matrix_TNN, iterations, eps)
