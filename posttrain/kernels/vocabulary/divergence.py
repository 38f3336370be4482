"""The walk over tiles that makes divergences and their gradients, the same on every device.

For each tile of tokens: both products with the heads (fp32 logits), then one pass that sums up each token, then one
that writes the gradient in the student's logits while they are still there. Logits are never computed twice.
The gradient is held for a group of tokens until its two products with head and hidden states: four products in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.gradients import owner_of
from posttrain.kernels.vocabulary.form import Form, Summary
from posttrain.kernels.vocabulary.tiles import (
    HeadGradient,
    group_tokens,
    hidden_gradient,
    matrix,
    product,
    spans,
    tile_tokens,
)


@dataclass(frozen=True)
class Models:
    """Both models' hidden states and heads, each pair in one dtype."""

    student_NH: Tensor
    head_VH: Tensor
    teacher_NG: Tensor
    teacher_head_VG: Tensor

    @classmethod
    def of(cls, student_NH: Tensor, head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor) -> Models:
        """Heads in the dtype of their hidden states."""
        heads = head_VH.to(student_NH.dtype), teacher_head_VG.to(teacher_NG.dtype)
        return cls(student_NH, heads[0], teacher_NG, heads[1])

    @property
    def tokens(self) -> int:
        return len(self.student_NH)

    @property
    def group(self) -> int:
        return max(group_tokens(self.tokens, len(self.head_VH), self.student_NH.dtype), 1)

    def new_gradient(self, tokens: int) -> Tensor:
        """Memory for the gradient in the logits of a group."""
        like = self.student_NH
        return matrix(tokens, len(self.head_VH), dtype=like.dtype, device=like.device)

    def new_summary(self) -> Tensor:
        return torch.empty(Summary.COUNT, self.tokens, dtype=torch.float32, device=self.student_NH.device)


def walk(
    models: Models,
    form: Form,
    tokens: slice,
    summary_FN: Tensor,
    gradient_NV: Tensor | None = None,
    weights_N: Tensor | None = None,
) -> None:
    """Fill the summary of these tokens, and the gradient in their logits, each times its weight."""
    vocabulary, device = len(models.head_VH), models.student_NH.device
    size = min(tile_tokens(vocabulary, device, divergence=True), tokens.stop - tokens.start)
    both_2NV = matrix(2, size, vocabulary, dtype=torch.float32, device=device)
    for tile in spans(tokens.start, tokens.stop, max(size, 1)):
        student_NV, teacher_NV = both_2NV[:, : tile.stop - tile.start]
        product(models.student_NH[tile], models.head_VH.t(), student_NV)
        product(models.teacher_NG[tile], models.teacher_head_VG.t(), teacher_NV)
        state = form.tiles.statistics(student_NV, teacher_NV, form, summary_FN[:, tile])
        if gradient_NV is not None:
            weights = None if weights_N is None else weights_N[tile]
            rows = gradient_NV[tile.start - tokens.start : tile.stop - tokens.start]
            form.tiles.gradient(state, form, summary_FN[:, tile], weights, rows)


class Divergence(torch.autograd.Function):
    """Divergence and student's entropy of each token; the gradient of the first is kept for backward.

    What is kept has weights of one: the slopes that backward brings multiply whole rows of it, that is, rows of the
    hidden states in one product and rows of the result in the other. Tokens beyond the first group are walked again.
    """

    @staticmethod
    def forward(
        ctx: Any, student_NH: Tensor, head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor, form: Form
    ) -> tuple[Tensor, Tensor]:
        models = Models.of(student_NH, head_VH, teacher_NG, teacher_head_VG)
        summary_FN, tokens = models.new_summary(), models.tokens
        kept_NV = models.new_gradient(min(models.group, tokens)) if any(ctx.needs_input_grad[:2]) else None
        kept = 0 if kept_NV is None else len(kept_NV)
        walk(models, form, slice(0, kept), summary_FN, kept_NV)
        walk(models, form, slice(kept, tokens), summary_FN)
        ctx.save_for_backward(student_NH, head_VH, teacher_NG, teacher_head_VG, kept_NV)
        ctx.form, ctx.owner = form, owner_of(head_VH)
        entropy_N = summary_FN[Summary.STUDENT_ENTROPY].clone()
        ctx.mark_non_differentiable(entropy_N)
        return summary_FN[Summary.DIVERGENCE].clone(), entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept_NV = ctx.saved_tensors
        models, slopes_N = Models.of(*inputs), slopes[0].float()
        student_NH, head_VH = inputs[:2]
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        groups = list(spans(0, models.tokens, models.group))
        out_NH = torch.empty_like(student_NH) if wants_hidden else None
        total = HeadGradient(head_VH, len(groups), owner=ctx.owner) if wants_head else None
        for number, group in enumerate(groups):
            if number == 0:
                gradient_NV = kept_NV
            else:
                gradient_NV = models.new_gradient(group.stop - group.start)
                walk(models, ctx.form, group, models.new_summary(), gradient_NV)
            if out_NH is not None:
                hidden_gradient(gradient_NV, models.head_VH, out_NH[group], slopes_N[group])
            if total is not None:
                hidden_NH = (student_NH[group] * slopes_N[group, None]).to(student_NH.dtype)
                total.add(gradient_NV, hidden_NH)
            del gradient_NV
        return out_NH, None if total is None else total.result(), None, None, None


def summary_and_gradients(
    models: Models, form: Form, weights_N: Tensor, like_head_VH: Tensor, total_VH: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The summary, and the gradients of `sum(weights · divergence)` in hidden states and head, group by group."""
    summary_FN = models.new_summary()
    groups = list(spans(0, models.tokens, models.group))
    out_NH, head = torch.empty_like(models.student_NH), HeadGradient(like_head_VH, len(groups), total_VH)
    for group in groups:
        gradient_NV = models.new_gradient(group.stop - group.start)
        walk(models, form, group, summary_FN, gradient_NV, weights_N)
        hidden_gradient(gradient_NV, models.head_VH, out_NH[group])
        head.add(gradient_NV, models.student_NH[group])
        del gradient_NV
    head_gradient_VH = head.result()
    assert head_gradient_VH is not None  # there is no owner
    return summary_FN, out_NH, head_gradient_VH
