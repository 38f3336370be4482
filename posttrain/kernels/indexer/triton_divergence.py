"""The indexer's training objective on the GPU: one program for each token, two passes over its row.

A row is read in tiles of one size from its first entry on, and an entry that does not exist adds 0: more padding
changes no bit.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.compiled import differentiable

TILE = 1024


@triton.jit
def load_pair(scores, target, at, columns, TILE: tl.constexpr):
    """A tile of both in fp32, and which of its entries exist; the target is 0 where one does not."""
    entries = at + tl.arange(0, TILE)
    scores_E = tl.load(scores + entries, mask=entries < columns, other=float("-inf")).to(tl.float32)
    exists_E = scores_E != float("-inf")
    target_E = tl.load(target + entries, mask=exists_E, other=0.0).to(tl.float32)
    return scores_E, target_E, exists_E


@triton.jit(do_not_specialize=["columns"])
def divergence_kernel(scores, target, out, lse, totals, columns, TILE: tl.constexpr):
    """`[T]`: the divergence, the scores' log-sum-exp and the sum of the target."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * columns
    target += row * columns
    top = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for at in range(0, columns, TILE):
        scores_E, target_E, exists_E = load_pair(scores, target, at, columns, TILE)
        new_top = tl.maximum(top, tl.max(scores_E, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.where(exists_E, tl.exp(scores_E - shift), 0.0), 0)
        total += tl.sum(target_E, 0)
        top = new_top
    # Without any entry: anything finite, for nothing will be multiplied by it.
    lse_row = tl.where(mass > 0.0, top + tl.log(tl.where(mass > 0.0, mass, 1.0)), 0.0)
    divisor = tl.where(total > 0.0, total, 1.0)
    divergence = tl.full((), 0.0, tl.float32)
    for at in range(0, columns, TILE):
        scores_E, target_E, exists_E = load_pair(scores, target, at, columns, TILE)
        share_E = target_E / divisor
        logs_E = tl.log(tl.where(share_E > 0.0, share_E, 1.0)) - (tl.where(exists_E, scores_E, 0.0) - lse_row)
        divergence += tl.sum(tl.where(share_E > 0.0, share_E * logs_E, 0.0), 0)
    tl.store(out + row, divergence)
    tl.store(lse + row, lse_row)
    tl.store(totals + row, total)


@triton.jit(do_not_specialize=["columns"])
def divergence_gradient_kernel(scores, target, lse, totals, slopes, dscores, columns, TILE: tl.constexpr):
    """`slope · (softmax(scores) - target / total)`, of one tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE
    entries = at + tl.arange(0, TILE)
    scores_E, target_E, exists_E = load_pair(scores + row * columns, target + row * columns, at, columns, TILE)
    total = tl.load(totals + row)
    slope = tl.where(total > 0.0, tl.load(slopes + row), 0.0)
    shares_E = tl.where(exists_E, tl.exp(scores_E - tl.load(lse + row)), 0.0)
    gradient_E = slope * (shares_E - target_E / tl.where(total > 0.0, total, 1.0))
    at_E = dscores + row * columns + entries
    tl.store(at_E, gradient_E.to(dscores.dtype.element_ty), mask=entries < columns)


class _IndexDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, target_TE: Tensor) -> Tensor:
        tokens, columns = scores_TE.shape
        out_T, lse_T, totals_T = (scores_TE.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        if tokens:
            divergence_kernel[(tokens,)](scores_TE, target_TE, out_T, lse_T, totals_T, columns, TILE=TILE, num_warps=4)
        ctx.save_for_backward(scores_TE, target_TE, lse_T, totals_T)
        return out_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        scores_TE = ctx.saved_tensors[0]
        dscores_TE = torch.empty_like(scores_TE)
        tokens, columns = scores_TE.shape
        if dscores_TE.numel():
            tensors = *ctx.saved_tensors, gradients[0].contiguous(), dscores_TE
            grid = tokens, triton.cdiv(columns, TILE)
            divergence_gradient_kernel[grid](*tensors, columns, TILE=TILE, num_warps=4)
        return dscores_TE, None


def index_divergence(scores_TE: Tensor, target_TE: Tensor) -> Tensor:
    """See the op."""
    return differentiable(_IndexDivergence, scores_TE.contiguous(), target_TE.detach().contiguous())
