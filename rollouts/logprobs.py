"""What the engine reports for a sampled token, to be computed by a trainer from its own logits.

vLLM's V1 sampler (`vllm/v1/sample/sampler.py`; the same in 0.25.1 and 0.32.0), asked for `processed_logprobs`: logits
to fp32, divided by the requests' temperatures as a tensor `[R, 1]`, top-k and top-p if asked for, then
`log_softmax(dim=-1, dtype=float32)` and a gather. torch computes each row of a softmax alone: on CUDA by one warp
(up to 1024 columns) or one block, whose order of addition follows from the number of columns, and from where a row
begins in memory, which is the same for all rows if the vocabulary is a multiple of 4. So equal logits give equal bits,
whatever the batch; and logits are equal where hidden states are, as `kernels.linear` is batch-invariant.

`kernels.linear_logprob` is another definition: its logits are never rounded to the model's dtype. In fp32 the two are
some 1e-6 apart, in bf16 as far as rounding takes the logits (2^-9 of their size).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sampler_logprobs(logits_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[N]`, fp32, as the engine reports them for tokens sampled at this temperature.

    Args:
        logits_NV: of the model's head, in its dtype.
        tokens_N: int64.
        temperature: above 0; top-k and top-p are not applied.
    """
    logits_NV = logits_NV.float()
    if temperature != 1:  # by a tensor: torch divides by a plain number in another way
        logits_NV = logits_NV / torch.full((len(logits_NV), 1), temperature, device=logits_NV.device)
    return torch.log_softmax(logits_NV, -1).gather(1, tokens_N.unsqueeze(1)).squeeze(1)
