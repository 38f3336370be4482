"""Experts in plain differentiable torch."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.indexer.op import topk_stable
from posttrain.kernels.linear.op import linear
from posttrain.kernels.wide import wide


def _scores(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    return torch.nn.functional.softplus(linear(wide(x_TH), wide(weight_EH))).sqrt()


def _weights(scores_TE: Tensor, experts_TK: Tensor, scaling: float) -> Tensor:
    weights_TK = scores_TE.gather(1, experts_TK)
    return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) * scaling


def route_topk(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """See the op."""
    scores_TE = _scores(x_TH, weight_EH)
    experts_TK = topk_stable(scores_TE.detach() + bias_E, k)
    return experts_TK, _weights(scores_TE, experts_TK, scaling)


def route_hash(
    x_TH: Tensor, weight_EH: Tensor, table_VK: Tensor, tokens_T: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See the op."""
    experts_TK = table_VK[tokens_T].long()
    return experts_TK, _weights(_scores(x_TH, weight_EH), experts_TK, scaling)


def swiglu(hidden_NJ: Tensor, limit: float) -> Tensor:
    """`silu(min(gate, limit)) · clamp(up, ±limit)` of `[gate | up]`."""
    gate, up = hidden_NJ.chunk(2, -1)
    return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def moe_experts(
    x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, w13_EJH: Tensor, w2_EHI: Tensor, limit: float
) -> Tensor:
    """See the op."""
    slots_SH = x_TH.new_zeros(experts_TK.numel(), x_TH.shape[1])
    for expert in experts_TK.unique().tolist():
        rows = (experts_TK.flatten() == expert).nonzero().squeeze(1)
        hidden = linear(x_TH[rows // experts_TK.shape[1]], w13_EJH[expert])
        slots_SH = slots_SH.index_copy(0, rows, linear(swiglu(hidden, limit), w2_EHI[expert]))
    return (slots_SH.view(*experts_TK.shape, x_TH.shape[1]) * weights_TK.to(x_TH.dtype).unsqueeze(-1)).sum(1)
