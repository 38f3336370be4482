"""Last hidden states of whole sequences, a batch of similar lengths at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKENS_PER_FORWARD = 16384
"""Tokens in one forward pass of a teacher; of a padded one with its padding."""


@torch.no_grad()
def states_of(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], kept: Sequence[int], device: str
) -> list[Tensor]:
    """For each sequence the states, after the final norm, that predict its last `kept[i]` tokens; `[kept[i], H]`.

    In the model's own precision, on `device`. V4 takes sequences packed, other models right-padded; both are causal, so
    that nothing depends on what else is in the batch (V4: bit for bit).
    """
    backbone = model.base_model
    packed = hasattr(backbone, "forward_packed")
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    for indices in batches([len(sequence) for sequence in sequences], packed):
        batch = [sequences[index] for index in indices]
        ends = [len(sequence) - 1 for sequence in batch]
        if packed:
            states_TH, starts = _packed(backbone, batch, device)
        else:
            states_TH, starts = _padded(backbone, batch, device)
        for index, start, end in zip(indices, starts, ends, strict=True):
            found[index] = states_TH[start + end - kept[index] : start + end]
    return found


def batches(lengths: Sequence[int], packed: bool) -> list[list[int]]:
    """Indices in batches of at most TOKENS_PER_FORWARD tokens (or one sequence), the longest sequences first."""
    found: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        # the first of a batch is its longest, so it decides the padded width
        wanted = tokens + lengths[index] if packed else (len(found[-1]) + 1) * lengths[found[-1][0]] if found else 0
        if found and wanted <= TOKENS_PER_FORWARD:
            found[-1].append(index)
            tokens = wanted
        else:
            found.append([index])
            tokens = lengths[index]
    return found


def _packed(backbone: PreTrainedModel, sequences: Sequence[Sequence[int]], device: str) -> tuple[Tensor, list[int]]:
    """States `[T, H]` and where each sequence starts."""
    from posttrain.models.deepseek_v4.context import PackedContext

    bounds = [0, *accumulate(map(len, sequences))]
    tokens_T = torch.tensor(list(chain.from_iterable(sequences))).to(device)
    context = PackedContext(torch.tensor(bounds), tokens_T.device)
    return backbone.forward_packed(tokens_T, context), bounds[:-1]


def _padded(backbone: PreTrainedModel, sequences: Sequence[Sequence[int]], device: str) -> tuple[Tensor, list[int]]:
    """The same, of right-padded rows."""
    width = max(map(len, sequences))
    tokens_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)] = torch.as_tensor(sequence)
        mask_BT[row, : len(sequence)] = 1
    tokens_BT, mask_BT = tokens_BT.to(device), mask_BT.to(device)
    states_BTH = backbone(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    return states_BTH.flatten(0, 1), [row * width for row in range(len(sequences))]
