"""Compression in plain differentiable torch."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.wide import wide


def compress(kv_EMD: Tensor, gate_EMD: Tensor, valid_EM: Tensor) -> Tensor:
    """Softmax-gated sum over each window."""
    weights = torch.softmax(wide(gate_EMD).masked_fill(~valid_EM.unsqueeze(-1), float("-inf")), 1)
    return (wide(kv_EMD) * weights).sum(1).to(kv_EMD.dtype)
