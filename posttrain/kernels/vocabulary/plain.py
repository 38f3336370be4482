"""What is done with a tile of logits where there is no kernel for it: torch, in a few passes over the tile.

The same functions as in `triton.py`: `statistics` fills the summary of the tile's tokens and hands on what `gradient`
needs, which writes the divergence's gradient in the student's logits. Both may overwrite the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.vocabulary.form import Form, Summary

State = tuple[Tensor, Tensor]


def statistics(student_NV: Tensor, teacher_NV: Tensor, form: Form, summary_FN: Tensor) -> State:
    """The summary of each token. Returns the student's probabilities, and what their gradient is made of."""
    if form.metrics:
        summary_FN[Summary.SAME_TOP] = (student_NV.argmax(-1) == teacher_NV.argmax(-1)).float()
    log_p_NV, log_q_NV = _log_softmax(student_NV, form), _log_softmax(teacher_NV, form)
    p_NV = log_p_NV.exp()
    summary_FN[Summary.STUDENT_ENTROPY] = -_dot(p_NV, log_p_NV)
    if form.metrics or form.beta != 1:
        q_NV = log_q_NV.exp()
        summary_FN[Summary.TEACHER_ENTROPY] = -_dot(q_NV, log_q_NV)
    if form.beta == 0:
        summary_FN[Summary.DIVERGENCE] = _dot(q_NV, log_q_NV.sub_(log_p_NV))
        return p_NV, q_NV
    if form.beta == 1:
        gap_NV = log_p_NV.sub_(log_q_NV)
        summary_FN[Summary.DIVERGENCE] = summary_FN[Summary.ANCHOR] = _dot(p_NV, gap_NV)
        return p_NV, gap_NV
    log_m_NV = torch.logaddexp(log_p_NV + form.log_shares[0], log_q_NV + form.log_shares[1])
    gap_NV = log_p_NV.sub_(log_m_NV)
    summary_FN[Summary.ANCHOR] = anchor_N = _dot(p_NV, gap_NV)
    to_mixture_N = _dot(q_NV, log_q_NV.sub_(log_m_NV))
    summary_FN[Summary.DIVERGENCE] = (1 - form.beta) * anchor_N + form.beta * to_mixture_N
    return p_NV, gap_NV


def gradient(state: State, form: Form, summary_FN: Tensor, weights_N: Tensor | None, out_NV: Tensor) -> None:
    """Each token's row of the gradient, times its weight."""
    p_NV, other_NV = state
    if form.beta == 0:
        torch.sub(p_NV, other_NV, out=out_NV)
    else:
        torch.mul(other_NV.sub_(summary_FN[Summary.ANCHOR][:, None]), p_NV, out=out_NV)
    if weights_N is not None:
        out_NV.mul_((weights_N * form.slope)[:, None])
    elif form.slope != 1:
        out_NV.mul_(form.slope)


def _log_softmax(logits_NV: Tensor, form: Form) -> Tensor:
    if form.inverse_temperature != 1:
        logits_NV = logits_NV.mul_(form.inverse_temperature)
    return torch.log_softmax(logits_NV, dim=-1)


def _dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_NV, b_NV)


def logprob_gradient(
    logits_NV: Tensor,
    tokens_N: Tensor,
    log_mass_N: Tensor,
    entropy_N: Tensor,
    slopes_2N: Tensor,
    inverse_temperature: float,
    out_NV: Tensor,
) -> None:
    """The gradient in the logits, given the slopes of the loss in the log-probability and in the entropy.

    d log p_t / dz_k = [k = t] - p_k,    dH / dz_k = -p_k (log p_k + H),    both by 1/temperature
    """
    to_logprob_N1, to_entropy_N1 = slopes_2N[..., None] * inverse_temperature
    log_p_NV = logits_NV.mul_(inverse_temperature).sub_(log_mass_N[:, None])
    p_NV = log_p_NV.exp()
    factor_NV = log_p_NV.add_(entropy_N[:, None]).mul_(to_entropy_N1).add_(to_logprob_N1).neg_()
    torch.mul(factor_NV, p_NV, out=out_NV)
    out_NV.scatter_add_(-1, tokens_N[:, None], to_logprob_N1)
