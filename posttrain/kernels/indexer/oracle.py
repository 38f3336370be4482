"""Index scores in plain differentiable torch."""

from __future__ import annotations

from torch import Tensor

from posttrain.kernels.wide import wide


def index_scores(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates_TE: Tensor) -> Tensor:
    """See the op."""
    tokens, candidates = candidates_TE.shape
    keys_TED = keys_SD.index_select(0, candidates_TE.clamp(min=0).flatten()).view(tokens, candidates, -1)
    dots_THE = (wide(q_THD) @ wide(keys_TED).transpose(1, 2)).relu()
    return (dots_THE * wide(weights_TH).unsqueeze(-1)).sum(1).masked_fill(candidates_TE < 0, float("-inf"))
