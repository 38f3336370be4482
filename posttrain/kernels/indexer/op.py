"""The lightning indexer: which compressed entries a query attends to (V4 report eqs. 13-17)."""

from __future__ import annotations

import torch
from torch import Tensor

GATHER_BUDGET = 1 << 24
"""Elements of keys gathered at once; longer inputs are scored in slices of tokens (same bits)."""


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
    tokens, candidates = candidates_TE.shape
    dim = q_THD.shape[-1]
    if candidates == 0:
        return q_THD.new_empty(tokens, 0, dtype=torch.float32)
    step = max(1, GATHER_BUDGET // max(1, candidates * dim))
    parts = []
    for start in range(0, max(tokens, 1), step):
        rows = candidates_TE[start : start + step]
        keys = keys_SD.index_select(0, rows.clamp(min=0).flatten()).view(-1, candidates, dim).float()
        dots = torch.bmm(q_THD[start : start + step].float(), keys.transpose(1, 2)).relu()
        scores = (dots * weights_TH[start : start + step].float().unsqueeze(-1)).sum(1)
        parts.append(scores.masked_fill(rows < 0, float("-inf")))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def topk_stable(scores: Tensor, k: int) -> Tensor:
    """Indices `[..., k]` of the `k` largest values, in descending order; ties go to the lowest index."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
