"""Sinkhorn normalisation of the mHC mixing matrices: a compiled CPU kernel, and plain torch elsewhere.

Forty tiny normalisations in torch cost more in launches than in arithmetic and would dominate a decode
step of a small model, so the CPU runs them in one loop nest (numba, which vLLM depends on anyway). Lanes are
tokens, so the arithmetic of a token is the same whichever tokens stand beside it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

LANES = 16


@numba.njit(cache=True, nogil=True)
def _normalise(a: Any, n: int, rows: bool, eps: Any, totals: Any) -> None:
    """Divide `a[n·n, LANES]` by its row or column sums (+ eps), keeping the sums."""
    for group in range(n):
        for lane in range(LANES):
            totals[group, lane] = eps
        for member in range(n):
            index = group * n + member if rows else member * n + group
            for lane in range(LANES):
                totals[group, lane] += a[index, lane]
        for member in range(n):
            index = group * n + member if rows else member * n + group
            for lane in range(LANES):
                a[index, lane] /= totals[group, lane]


@numba.njit(cache=True, nogil=True)
def _forward(matrix: Any, out: Any, n: int, iterations: int, eps: Any) -> None:
    size = n * n
    a = np.empty((size, LANES), np.float32)
    totals = np.empty((n, LANES), np.float32)
    for start in range(0, matrix.shape[0], LANES):
        width = min(LANES, matrix.shape[0] - start)
        a[:] = np.float32(1)
        for lane in range(width):
            for i in range(size):
                a[i, lane] = matrix[start + lane, i]
        _normalise(a, n, False, eps, totals)
        for _ in range(iterations - 1):
            _normalise(a, n, True, eps, totals)
            _normalise(a, n, False, eps, totals)
        for lane in range(width):
            for i in range(size):
                out[start + lane, i] = a[i, lane]


@numba.njit(cache=True, nogil=True)
def _backward(matrix: Any, gradient: Any, out: Any, n: int, iterations: int, eps: Any) -> None:
    """Recomputes every stage of a chunk of tokens, then walks back: dx = (dy - sum(dy · y)) / total."""
    size, stages = n * n, 2 * iterations - 1
    values = np.empty((stages + 1, size, LANES), np.float32)
    totals = np.empty((stages, n, LANES), np.float32)
    d = np.empty((size, LANES), np.float32)
    dot = np.empty(LANES, np.float32)
    for start in range(0, matrix.shape[0], LANES):
        width = min(LANES, matrix.shape[0] - start)
        values[0] = np.float32(1)
        d[:] = np.float32(0)
        for lane in range(width):
            for i in range(size):
                values[0, i, lane] = matrix[start + lane, i]
                d[i, lane] = gradient[start + lane, i]
        for stage in range(stages):
            values[stage + 1] = values[stage]
            _normalise(values[stage + 1], n, stage % 2 == 1, eps, totals[stage])
        for stage in range(stages - 1, -1, -1):
            rows = stage % 2 == 1
            for group in range(n):
                dot[:] = np.float32(0)
                for member in range(n):
                    index = group * n + member if rows else member * n + group
                    for lane in range(LANES):
                        dot[lane] += d[index, lane] * values[stage + 1, index, lane]
                for member in range(n):
                    index = group * n + member if rows else member * n + group
                    for lane in range(LANES):
                        d[index, lane] = (d[index, lane] - dot[lane]) / totals[stage, group, lane]
        for lane in range(width):
            for i in range(size):
                out[start + lane, i] = d[i, lane]


class _CompiledSinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix_TNN: Tensor, iterations: int, eps: float) -> Tensor:
        matrix_TNN = matrix_TNN.contiguous()
        out = torch.empty_like(matrix_TNN)
        n = matrix_TNN.shape[-1]
        flat = matrix_TNN.detach().view(-1, n * n).numpy()
        _forward(flat, out.view(-1, n * n).numpy(), n, iterations, np.float32(eps))
        ctx.save_for_backward(matrix_TNN)
        ctx.iterations, ctx.eps = iterations, eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (matrix_TNN,) = ctx.saved_tensors
        n = matrix_TNN.shape[-1]
        out = torch.empty_like(matrix_TNN)
        _backward(
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
