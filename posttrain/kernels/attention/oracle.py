"""Sparse attention in plain differentiable torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.blocks import block_sum
from posttrain.kernels.wide import wide


def sparse_attention(q_THD: Tensor, sources: Sequence[tuple[Tensor, Tensor]], sink_H: Tensor, scale: float) -> Tensor:
    """See the op."""
    # A row of zeros at the end is what -1 points to.
    entries_TKD = torch.cat([F.pad(store, (0, 0, 0, 1))[index] for store, index in sources], 1)
    exists_TK = torch.cat([index >= 0 for _, index in sources], 1)
    scores_THK = wide(q_THD @ entries_TKD.transpose(1, 2)) * scale
    scores_THK = scores_THK.masked_fill(~exists_TK.unsqueeze(1), float("-inf"))
    sink_TH = wide(sink_H).expand(len(q_THD), -1)
    top_TH = sink_TH.detach()
    if scores_THK.shape[-1]:
        top_TH = torch.maximum(scores_THK.detach().amax(-1), top_TH)
    weights_THK = torch.exp(scores_THK - top_TH.unsqueeze(-1))
    total_TH = block_sum(weights_THK) + torch.exp(sink_TH - top_TH)
    return (weights_THK / total_TH.unsqueeze(-1)).to(q_THD.dtype) @ entries_TKD
