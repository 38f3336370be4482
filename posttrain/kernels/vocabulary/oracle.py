"""Log-probabilities and divergences from dense logits, in plain differentiable torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posttrain.kernels.wide import wide


def log_softmax(hidden_NH: Tensor, head_VH: Tensor, temperature: float) -> Tensor:
    """`log softmax(hidden · headᵀ / temperature)`, `[N, V]`."""
    return torch.log_softmax(wide(hidden_NH) @ wide(head_VH).T / temperature, dim=-1)


def linear_logprob(hidden_NH: Tensor, head_VH: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of what it was drawn from."""
    log_p_NV = log_softmax(hidden_NH, head_VH, temperature)
    logprob_N = log_p_NV.gather(-1, tokens_N.long()[:, None])[:, 0]
    return logprob_N, -(log_p_NV.exp() * log_p_NV).sum(-1)


def divergence(log_p_NV: Tensor, log_q_NV: Tensor, beta: float) -> Tensor:
    """The member `beta` of the generalised Jensen-Shannon family between p (student) and q (teacher), `[N]`."""
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    if beta == 0:
        return (q_NV * (log_q_NV - log_p_NV)).sum(-1)
    if beta == 1:
        return (p_NV * (log_p_NV - log_q_NV)).sum(-1)
    log_m_NV = torch.logaddexp(log_p_NV + math.log1p(-beta), log_q_NV + math.log(beta))
    to_mixture_N = (p_NV * (log_p_NV - log_m_NV)).sum(-1)
    return (1 - beta) * to_mixture_N + beta * (q_NV * (log_q_NV - log_m_NV)).sum(-1)
