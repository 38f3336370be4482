"""What the engine reports for a sampled token, to be computed by a trainer from its own logits.

vLLM's V1 sampler (`vllm/v1/sample/sampler.py`; the same in 0.25.1 and 0.32.0), asked for `processed_logprobs`: logits
to fp32, divided by the requests' temperatures as a tensor `[R, 1]`, top-k and top-p if asked for, then
`log_softmax(dim=-1, dtype=float32)` and a gather. torch computes each row of a softmax alone: on CUDA by one warp
(up to 1024 columns) or one block, whose order of addition follows from the number of columns, and from where a row
begins in memory, which is the same for all rows if the vocabulary is a multiple of 4. So equal logits give equal bits,
whatever the batch; and logits are equal where hidden states are, as `kernels.linear` is batch-invariant.

`kernels.linear_logprob(rounded=True)` is the same from hidden states, with gradients and without whole logits.
"""

from __future__ import annotations

from torch import Tensor

from posttrain.kernels.vocabulary.logprob import log_softmax_of_sampler


def sampler_logprobs(logits_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[N]`, fp32, as the engine reports them for tokens sampled at this temperature.

    Args:
        logits_NV: of the model's head, in its dtype.
        tokens_N: int64.
        temperature: above 0; top-k and top-p are not applied.
    """
    return log_softmax_of_sampler(logits_NV, temperature).gather(1, tokens_N.unsqueeze(1)).squeeze(1)
