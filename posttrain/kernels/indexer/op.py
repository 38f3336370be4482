"""The lightning indexer: which compressed entries a query attends to (V4 report eqs. 13-17)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable, float_rows, has_kernels, run
from posttrain.kernels.indexer import oracle

cpu = Kernels(__package__)


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates_TE: Tensor) -> Tensor:
        out_TE = q_THD.new_empty(candidates_TE.shape)
        keys = keys_SD.data_ptr(), keys_SD.stride(0), len(keys_SD)
        run(cpu.forward, q_THD, weights_TH, *q_THD.shape, *keys, candidates_TE, candidates_TE.shape[1], out_TE)
        ctx.save_for_backward(q_THD, weights_TH, keys_SD, candidates_TE)
        return out_TE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_THD, weights_TH, keys_SD, candidates_TE = ctx.saved_tensors
        dq_THD, dweights_TH = torch.zeros_like(q_THD), torch.zeros_like(weights_TH)
        dkeys_SD = keys_SD.new_zeros(keys_SD.shape)
        keys, results = (keys_SD.data_ptr(), keys_SD.stride(0)), (dq_THD, dweights_TH, dkeys_SD)
        candidates = candidates_TE, candidates_TE.shape[1]
        run(cpu.backward, q_THD, weights_TH, *q_THD.shape, *keys, *candidates, gradients[0].contiguous(), *results)
        return dq_THD, dweights_TH, dkeys_SD, None


def index_scores(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates_TE: Tensor) -> Tensor:
    """`I[t, e] = sum_h w[t, h] · relu(q[t, h] · key[candidate(t, e)])` in fp32.

    Args:
        q_THD: rotated indexer queries.
        weights_TH: head weights, already scaled by `D**-0.5 · H**-0.5`.
        keys_SD: the store of compressed indexer keys.
        candidates_TE: int64 rows of `keys_SD`, -1 where there is none; `E` a multiple of `BLOCK`.

    Returns:
        `[T, E]` fp32, -inf where there is no candidate.
    """
    tokens, heads, dim = expect("index_scores", "q", q_THD, "T", "H", "D")
    expect("index_scores", "weights", weights_TH, tokens, heads)
    expect("index_scores", "keys", keys_SD, "S", dim)
    expect("index_scores", "candidates", candidates_TE, tokens, "E")
    if has_kernels(q_THD):
        inputs = dense(q_THD), dense(weights_TH), float_rows(keys_SD), candidates_TE.long().contiguous()
        return differentiable(_IndexScores, *inputs)
    return oracle.index_scores(q_THD, weights_TH, keys_SD, candidates_TE)


def topk_stable(scores: Tensor, k: int) -> Tensor:
    """Indices `[..., k]` of the `k` largest values, in descending order; ties go to the lowest index."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
