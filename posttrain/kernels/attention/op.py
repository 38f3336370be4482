"""Multi-query attention over gathered entries with a sink, keys being values (V4 report §2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.blocks import BLOCK, block_sum


def _gather(stores: Sequence[Tensor], indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The entries of every token, `[T, K, D]`, and which of them exist, `[T, K]`."""
    parts = [
        store.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, store.shape[-1])
        for store, index in zip(stores, indices, strict=True)
    ]
    valid = [index >= 0 for index in indices]
    return (parts[0], valid[0]) if len(parts) == 1 else (torch.cat(parts, 1), torch.cat(valid, 1))


class _SparseAttention(torch.autograd.Function):
    """Forward and backward by hand: one gather, two batched products each way, no dense score matrix."""

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, sink_H: Tensor, scale: float, count: int, *rest: Tensor) -> Tensor:
        stores, indices = rest[:count], rest[count:]
        entries_TKD, valid_TK = _gather(stores, indices)
        scores_THK = torch.bmm(q_THD, entries_TKD.transpose(1, 2)).float() * scale
        scores_THK.masked_fill_(~valid_TK.unsqueeze(1), float("-inf"))
        sink_TH = sink_H.float().expand(q_THD.shape[0], -1)
        top_TH = torch.maximum(scores_THK.amax(-1), sink_TH)
        weights_THK = torch.exp(scores_THK - top_TH.unsqueeze(-1))
        sink_weight_TH = torch.exp(sink_TH - top_TH)
        total_TH = block_sum(weights_THK) + sink_weight_TH
        weights_THK = weights_THK / total_TH.unsqueeze(-1)
        out_THD = torch.bmm(weights_THK.to(q_THD.dtype), entries_TKD)
        ctx.save_for_backward(q_THD, entries_TKD, weights_THK, sink_weight_TH / total_TH, out_THD, *indices)
        ctx.scale, ctx.sizes = scale, [store.shape[0] for store in stores]
        return out_THD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, entries_TKD, weights_THK, sink_weight_TH, out_THD, *indices = ctx.saved_tensors
        gradient = gradients[0]
        delta_TH = (gradient.float() * out_THD.float()).sum(-1)
        dweights_THK = torch.bmm(gradient, entries_TKD.transpose(1, 2)).float()
        dscores_THK = (weights_THK * (dweights_THK - delta_TH.unsqueeze(-1)) * ctx.scale).to(q_THD.dtype)
        dq_THD = torch.bmm(dscores_THK, entries_TKD)
        dsink_H = -(sink_weight_TH * delta_TH).sum(0)
        dentries_TKD = torch.bmm(dscores_THK.transpose(1, 2), q_THD)
        dentries_TKD += torch.bmm(weights_THK.to(gradient.dtype).transpose(1, 2), gradient)
        stores: list[Tensor | None] = []
        start = 0
        for index, size in zip(indices, ctx.sizes, strict=True):
            part = dentries_TKD[:, start : start + index.shape[1]].reshape(-1, dentries_TKD.shape[-1])
            start += index.shape[1]
            # Places without an entry have weight 0, so what they add to row 0 is exactly 0.
            store = torch.zeros(size, part.shape[-1], dtype=part.dtype, device=part.device)
            stores.append(store.index_add_(0, index.clamp(min=0).flatten(), part))
        return dq_THD, dsink_H, None, None, *stores, *[None] * len(indices)


def sparse_attention(
    q_THD: Tensor, sources: Sequence[tuple[Tensor, Tensor]], sink_H: Tensor, scale: float
) -> Tensor:
    """Each token attends to the entries that its index rows name, and to a sink that absorbs weight.

    `out[t, h] = sum_k exp(s_k) e_k / (sum_k exp(s_k) + exp(sink_h))`, `s_k = scale · q[t, h] · e_k`

    Args:
        q_THD: queries.
        sources: pairs of a store `[S, D]` (window KV, compressed KV) and int64 rows `[T, K]` into it,
            -1 for none; each `K` a multiple of `BLOCK`. Keys and values are the same entries.
        sink_H: one logit for each head.
        scale: softmax scale, `D**-0.5` in V4.

    Returns:
        `[T, H, D]`. Gradients go to `q_THD`, every store and `sink_H`.
    """
    for number, (_, index) in enumerate(sources):
        if index.dim() != 2 or index.shape[0] != q_THD.shape[0] or index.shape[1] % BLOCK:
            raise ValueError(
                f"sparse_attention: sources[{number}] index has shape {tuple(index.shape)}; "
                f"expected [{q_THD.shape[0]}, a multiple of {BLOCK}]"
            )
    used = [source for source in sources if source[1].shape[1]]
    stores = [store for store, _ in used]
    indices = [index for _, index in used]
    return _SparseAttention.apply(q_THD, sink_H, scale, len(used), *stores, *indices)
