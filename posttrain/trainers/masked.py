"""Log-probabilities among the tokens that top-p left to be drawn ("keep sampling mask", V3.2 report §3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain import kernels
from rollouts.masks import decode_kept

TILE_TOKENS = 384
"""Tokens whose logits are in memory at once; backwards they are computed again."""


def masked_logprob(
    hidden_NH: Tensor, head_VH: Tensor, tokens_N: Tensor, temperature: float, masks: Sequence[bytes]
) -> tuple[Tensor, Tensor]:
    """`kernels.linear_logprob(rounded=True)` where only some tokens count: what the engine reported, to the last bit.

    Args:
        hidden_NH, head_VH, tokens_N, temperature: as there.
        masks: for each row the tokens that count (`rollouts.masks.encode_kept`).

    Returns:
        Log-probability of each row's token among those that count, and the entropy over these, `[N]`, fp32, with
        gradients.
    """
    if len(masks) != len(hidden_NH):
        raise ValueError(f"{len(masks)} masks for {len(hidden_NH)} tokens")
    found = [
        checkpoint(_tile, hidden_NH[tile], head_VH, tokens_N[tile], temperature, masks[tile], use_reentrant=False)
        for tile in (slice(at, at + TILE_TOKENS) for at in range(0, len(hidden_NH), TILE_TOKENS))
    ]
    logprobs, entropies = zip(*found, strict=True) if found else ((), ())
    empty_N = hidden_NH.new_zeros(0, dtype=torch.float32)
    return torch.cat([*logprobs, empty_N]), torch.cat([*entropies, empty_N])


def _tile(
    hidden_NH: Tensor, head_VH: Tensor, tokens_N: Tensor, temperature: float, masks: Sequence[bytes]
) -> tuple[Tensor, Tensor]:
    kept_NV = torch.from_numpy(np.stack([decode_kept(mask, len(head_VH)) for mask in masks])).to(hidden_NH.device)
    logits_NV = kernels.linear(hidden_NH, head_VH.to(hidden_NH.dtype)).float()
    if temperature != 1:  # as vLLM's sampler does it
        logits_NV = logits_NV / torch.full((len(logits_NV), 1), temperature, device=logits_NV.device)
    log_p_NV = torch.log_softmax(logits_NV.masked_fill(~kept_NV, -torch.inf), -1)
    entropy_N = -(log_p_NV.exp() * log_p_NV.masked_fill(~kept_NV, 0)).sum(-1)
    return log_p_NV.gather(1, tokens_N[:, None])[:, 0], entropy_N
