"""Compression of token windows into single KV entries (V4 report eqs. 9-12 for CSA, 20-23 for HCA)."""

from __future__ import annotations

import torch
from torch import Tensor


def compress(kv_EMD: Tensor, gate_EMD: Tensor, valid_EM: Tensor) -> Tensor:
    """Softmax-gated sum over each window, channel by channel.

    `entry[e, d] = sum_m softmax_m(gate[e, m, d]) · kv[e, m, d]`

    Args:
        kv_EMD: the window's projected tokens. For CSA the first half of `M` is the previous block's
            `a` series and the second half this block's `b` series; for HCA it is one block.
        gate_EMD: the gates with their position bias added, fp32.
        valid_EM: False for places before the sequence's start (CSA's first entry): weight 0.

    Returns:
        `[E, D]` in `kv_EMD`'s dtype, before norm and rotation.
    """
    gate = gate_EMD.float().masked_fill(~valid_EM.unsqueeze(-1), float("-inf"))
    weights = torch.exp(gate - gate.amax(1, keepdim=True))
    weights = weights / weights.sum(1, keepdim=True)
    return (kv_EMD * weights.to(kv_EMD.dtype)).sum(1)
