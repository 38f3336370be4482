"""Index scores and the indexer's training objective in plain differentiable torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.wide import wide


def index_scores(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates_TE: Tensor) -> Tensor:
    """See the op; candidates as rows."""
    keys_TED = F.pad(keys_SD, (0, 0, 0, 1))[candidates_TE]
    dots_THE = (wide(q_THD) @ wide(keys_TED).transpose(1, 2)).relu()
    return (dots_THE * wide(weights_TH).unsqueeze(-1)).sum(1).masked_fill(candidates_TE < 0, float("-inf"))


def topk_stable(scores: Tensor, k: int) -> Tensor:
    """See the op."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def index_divergence(scores_TE: Tensor, target_TE: Tensor) -> Tensor:
    """See the op."""
    scores_TE = wide(scores_TE)
    missing_TE = scores_TE == float("-inf")
    target_TE = target_TE.detach().to(scores_TE.dtype).masked_fill(missing_TE, 0)
    total_T1 = target_TE.sum(-1, keepdim=True)
    target_TE = target_TE / torch.where(total_T1 > 0, total_T1, 1)
    # Not -inf: its product with a target of 0 would be NaN.
    log_TE = scores_TE.masked_fill(missing_TE, torch.finfo(scores_TE.dtype).min).log_softmax(-1)
    return (torch.xlogy(target_TE, target_TE) - target_TE * log_TE).sum(-1)
