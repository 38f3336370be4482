"""Index scores in plain differentiable torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.wide import wide


def index_scores(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates_TE: Tensor) -> Tensor:
    """See the op."""
    keys_TED = F.pad(keys_SD, (0, 0, 0, 1))[candidates_TE]
    dots_THE = (wide(q_THD) @ wide(keys_TED).transpose(1, 2)).relu()
    return (dots_THE * wide(weights_TH).unsqueeze(-1)).sum(1).masked_fill(candidates_TE < 0, float("-inf"))
