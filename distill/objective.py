"""What the student minimises at a position, and the forms of it that are there to be compared with.

The divergences of `posttrain.kernels.vocabulary` are exact, over the whole vocabulary. The others are estimates of the
reverse KL or controls, for comparisons; they are computed from dense logits of a tile of tokens at a time.
With p the student's distribution, q the teacher's, y the sampled token, all at the objective's temperature:

    top_k             D over the k tokens that q prefers and one more outcome, all other tokens together. A lower bound
                      of D, and D itself at k = V. Without that outcome the student could lower the loss by moving
                      probability out of the k tokens.
    sampled_token     log p(y) - log q(y): an unbiased estimate of KL(p || q). Its gradient is the policy gradient with
                      the advantage log q(y) - log p(y), held fixed.
    fixed_negative    the same estimate is reported, and the advantage is -1 whatever the teacher says: what does
                      learning from one's own samples do by itself?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels import divergence_gradients
from posttrain.kernels.vocabulary.op import BETA
from posttrain.kernels.vocabulary.oracle import divergence, log_softmax
from posttrain.kernels.vocabulary.tiles import spans, tile_tokens

ObjectiveKind = Literal["reverse_kl", "forward_kl", "jsd", "sampled_token", "fixed_negative"]


@dataclass(frozen=True)
class Objective:
    """What is minimised; the default is V4's."""

    kind: ObjectiveKind = "reverse_kl"
    temperature: float = 1.0
    """Of both models' distributions."""
    beta: float | None = None
    """For `jsd`: the mixture is (1 - beta) p + beta q; None: 0.5."""
    top_k: int | None = None
    """For divergences: keep the teacher's k likeliest tokens apart, and lump the others together."""


class Found(NamedTuple):
    """The objective at each position, what else was seen, and the gradients of the weighted sum."""

    value_N: Tensor
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    same_top_N: Tensor
    student_gradient_NH: Tensor
    head_gradient_VH: Tensor


def gradients(
    objective: Objective,
    models: tuple[Tensor, Tensor, Tensor, Tensor],
    weights_N: Tensor,
    tokens_N: Tensor | None,
    head_total_VH: Tensor | None,
) -> Found:
    """The objective and the gradients of `sum(weights · objective)`, outside of autograd.

    Args:
        models: states and head of the student `[N, H]`, `[V, H]` and of the teacher `[N, G]`, `[V, G]`.
        weights_N: fp32.
        tokens_N: the sampled tokens, int64; only `sampled_token` and `fixed_negative` need them.
        head_total_VH: fp32; the head's gradient is added to it, in place.
    """
    kind, temperature, beta = objective.kind, objective.temperature, objective.beta
    if kind == "sampled_token" or kind == "fixed_negative" or objective.top_k is not None:
        return _from_tiles(objective, models, weights_N, tokens_N, head_total_VH)
    return Found(*divergence_gradients(kind, *models, weights_N, temperature, beta, head_total_VH))


def _from_tiles(
    objective: Objective,
    models: tuple[Tensor, Tensor, Tensor, Tensor],
    weights_N: Tensor,
    tokens_N: Tensor | None,
    head_total_VH: Tensor | None,
) -> Found:
    student_NH, head_VH, teacher_NG, teacher_head_VG = models
    total_VH = head_total_VH if head_total_VH is not None else torch.zeros_like(head_VH, dtype=weights_N.dtype)
    head_VH = head_VH.detach().requires_grad_()
    gradient_NH = torch.empty_like(student_NH)
    rows = []
    device = student_NH.device
    for span in spans(0, len(student_NH), tile_tokens(len(head_VH), device)):
        hidden_NH = student_NH[span].detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            log_q_NV = log_softmax(teacher_NG[span].detach(), teacher_head_VG.detach(), objective.temperature)
            log_p_NV = log_softmax(hidden_NH, head_VH, objective.temperature)
            tokens = None if tokens_N is None else tokens_N[span]
            value_N, surrogate_N = _value_and_surrogate(objective, log_p_NV, log_q_NV, tokens)
            loss = (weights_N[span] * surrogate_N).sum()
        gradient_NH[span], by_head_VH = torch.autograd.grad(loss, (hidden_NH, head_VH))
        total_VH += by_head_VH
        log_p_NV = log_p_NV.detach()
        entropies = (-(log_NV.exp() * log_NV).sum(-1) for log_NV in (log_p_NV, log_q_NV))
        rows.append((value_N.detach(), *entropies, log_p_NV.argmax(-1) == log_q_NV.argmax(-1)))
    value_N, student_N, teacher_N, same_N = (torch.cat(column) for column in zip(*rows, strict=True))
    head_gradient_VH = total_VH if head_total_VH is not None else total_VH.to(models[1].dtype)
    return Found(value_N, student_N, teacher_N, same_N, gradient_NH, head_gradient_VH)


def _value_and_surrogate(
    objective: Objective, log_p_NV: Tensor, log_q_NV: Tensor, tokens_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The objective of each position, and what has its gradient."""
    kind = objective.kind
    if kind == "sampled_token" or kind == "fixed_negative":
        assert tokens_N is not None, f"{kind} learns from the sampled tokens"
        log_p_N, log_q_N = (log_NV.gather(-1, tokens_N[:, None])[:, 0] for log_NV in (log_p_NV, log_q_NV))
        value_N = (log_p_N - log_q_N).detach()
        return value_N, log_p_N if kind == "fixed_negative" else value_N * log_p_N
    assert objective.top_k is not None
    kept_NK = log_q_NV.topk(min(objective.top_k, log_q_NV.shape[-1]), dim=-1).indices
    beta = BETA[kind] if objective.beta is None else objective.beta
    value_N = divergence(_lumped(log_p_NV, kept_NK), _lumped(log_q_NV, kept_NK), beta)
    return value_N, value_N


def _lumped(log_NV: Tensor, kept_NK: Tensor) -> Tensor:
    """Log-probabilities of the kept tokens and, if there are others, of all others together: `[N, K + 1]`."""
    log_kept_NK = log_NV.gather(-1, kept_NK)
    if kept_NK.shape[-1] == log_NV.shape[-1]:
        return log_kept_NK
    others_NV = log_NV.scatter(-1, kept_NK, float("-inf"))
    return torch.cat((log_kept_NK, others_NV.logsumexp(-1, keepdim=True)), dim=-1)
