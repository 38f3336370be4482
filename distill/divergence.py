"""Exact divergences between student and teacher over the whole vocabulary, from hidden states and heads.

On-policy distillation minimises (DeepSeek-V4 report, eq. 29)

    L(theta) = sum_i w_i KL( pi_theta || pi_Ei ),   on samples of pi_theta.

With student logits z, teacher logits u, p = softmax(z), q = softmax(u), a position contributes

    KL             = sum_v p_v (z_v - u_v) - lse(z) + lse(u)
    d KL / d z_k   = p_k [ (log p_k - log q_k) - KL ].

Neither logits are ever held in full (`posttrain.kernels.vocabulary` walks over tiles of tokens). Several teachers are
worked off one after the other by `one_head_at_a_time`, each with its own head, so that no two heads are in memory at
once (section 5.2.2 of the report).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.objective import Objective, gradients
from posttrain.errors import BadInput
from posttrain.kernels import linear_divergence
from posttrain.kernels.vocabulary.op import BETA
from posttrain.kernels.vocabulary.op import DivergenceKind as Divergence

__all__ = [
    "BETA",
    "Divergence",
    "TeacherReport",
    "TeacherRows",
    "divergence",
    "forward_kl",
    "jsd",
    "one_head_at_a_time",
    "reverse_kl",
    "vocabulary_mismatch",
]


def divergence(
    kind: Divergence, student_NH: Tensor, student_head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor
) -> tuple[Tensor, Tensor]:
    """Divergence and the student's entropy at each position, in nats; two tensors of shape [N].

    `student_NH` and `teacher_NG` are last hidden states (after the final norm) of the same N positions; the widths
    H and G may differ, the vocabulary V may not. Gradients reach the student's hidden states and head only.
    Raises BadInput when the vocabularies differ.
    """
    _expect_same_vocabulary("the teacher", student_head_VH, teacher_head_VG)
    return linear_divergence(kind, student_NH, student_head_VH, teacher_NG, teacher_head_VG)


def reverse_kl(student_NH: Tensor, student_head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor) -> Tensor:
    """KL(student || teacher) at each position; shape [N]."""
    return divergence("reverse_kl", student_NH, student_head_VH, teacher_NG, teacher_head_VG)[0]


def forward_kl(student_NH: Tensor, student_head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor) -> Tensor:
    """KL(teacher || student) at each position; shape [N]."""
    return divergence("forward_kl", student_NH, student_head_VH, teacher_NG, teacher_head_VG)[0]


def jsd(student_NH: Tensor, student_head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor) -> Tensor:
    """Jensen-Shannon divergence (mean of the KLs of both to their average) at each position; shape [N]."""
    return divergence("jsd", student_NH, student_head_VH, teacher_NG, teacher_head_VG)[0]


def vocabulary_mismatch(teacher: str, teacher_size: int, student_size: int) -> str:
    """The message for a teacher that cannot teach this student."""
    return (
        f"{teacher} has a vocabulary of {teacher_size} tokens, the student one of {student_size}; on-policy "
        "distillation compares whole distributions, so both need the same tokenizer and vocabulary size"
    )


def _expect_same_vocabulary(teacher: str, student_head_VH: Tensor, teacher_head_VG: Tensor) -> None:
    if student_head_VH.size(0) != teacher_head_VG.size(0):
        raise BadInput(vocabulary_mismatch(teacher, teacher_head_VG.size(0), student_head_VH.size(0)))


@dataclass(frozen=True)
class TeacherRows:
    """The positions of one batch that one teacher teaches. The two callables are called once, in this order."""

    name: str
    rows: slice
    """Its positions among the student's."""
    weight: float
    """Factor of the mean divergence over its positions."""
    hidden: Callable[[], Tensor]
    """Last hidden states of the teacher, [rows, G]."""
    head: Callable[[], Tensor]
    """Weight of the teacher's head, [V, G]."""


@dataclass(frozen=True)
class TeacherReport:
    """What happened on the positions of one teacher; means over the positions, entropies in nats."""

    name: str
    tokens: int
    divergence: float
    top1_agreement: float
    student_entropy: float
    teacher_entropy: float
    reverse_kl: float
    """KL(student || teacher) at temperature 1, whatever the objective: what different objectives can be compared by."""
    divergence_N: Tensor = field(compare=False, repr=False)
    """At each position."""


def one_head_at_a_time(
    objective: Objective,
    student_NH: Tensor,
    student_head_VH: Tensor,
    teachers: Sequence[TeacherRows],
    tokens_N: Tensor | None = None,
) -> tuple[Tensor, list[TeacherReport]]:
    """The loss  sum_i weight_i * mean over teacher i's rows of the objective,  and a report on each teacher.

    Teachers may share rows. `tokens_N` are the sampled tokens, for objectives that learn from them.

    The gradient of each term is taken as soon as the term is there, and its teacher's states and head are let go
    before the next are fetched. A head is freed only when the callables hand over the only reference to it.
    """
    reports: list[TeacherReport] = []
    return _OneHeadAtATime.apply(student_NH, student_head_VH, objective, teachers, tokens_N, reports), reports


class _OneHeadAtATime(torch.autograd.Function):
    """Computes the gradients in the forward pass: a graph over all teachers would keep every head until backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NH: Tensor,
        student_head_VH: Tensor,
        objective: Objective,
        teachers: Sequence[TeacherRows],
        tokens_N: Tensor | None,
        reports: list[TeacherReport],
    ) -> Tensor:
        grad_hidden_NH = torch.zeros_like(student_NH)
        # Several teachers' gradients add up in fp32; that of a single one comes in the head's dtype.
        several = len(teachers) != 1
        grad_head_VH = torch.zeros_like(student_head_VH, dtype=_sum_dtype(student_head_VH)) if several else None
        total = torch.zeros((), dtype=_sum_dtype(student_NH), device=student_NH.device)
        for teacher in teachers:
            rows = teacher.rows
            tokens = None if tokens_N is None else tokens_N[rows]
            term, grad_rows_NH, grad_head_VH = _term(
                objective, student_NH[rows], student_head_VH, teacher, tokens, grad_head_VH
            )
            grad_hidden_NH[rows] += grad_rows_NH
            total += teacher.weight * term.divergence
            reports.append(term)
        assert grad_head_VH is not None
        ctx.save_for_backward(grad_hidden_NH, grad_head_VH.to(student_head_VH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # type: ignore[override]
        grad_hidden_NH, grad_head_VH = ctx.saved_tensors
        return grad_hidden_NH * grad, grad_head_VH * grad, None, None, None, None


def _sum_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype is torch.float64 else torch.float32


def _term(
    objective: Objective,
    rows_NH: Tensor,
    head_VH: Tensor,
    teacher: TeacherRows,
    tokens_N: Tensor | None,
    grad_head_VH: Tensor | None,
) -> tuple[TeacherReport, Tensor, Tensor]:
    """One teacher's report and the gradients of its term in its rows and in the head, the latter on top of
    `grad_head_VH` if given. The teacher's tensors die with the call."""
    teacher_NG = teacher.hidden().to(rows_NH.device)
    teacher_head_VG = teacher.head().to(rows_NH.device)
    teacher_NG = teacher_NG.to(teacher_head_VG.dtype)  # states may have been rounded on the way, the head is not
    _expect_same_vocabulary(teacher.name, head_VH, teacher_head_VG)
    weights_N = torch.full_like(rows_NH[:, 0], teacher.weight / len(rows_NH), dtype=_sum_dtype(rows_NH))
    models = rows_NH, head_VH, teacher_NG, teacher_head_VG
    with torch.no_grad():
        found = gradients(objective, models, weights_N, tokens_N, grad_head_VH)
        reverse_N = found.value_N if objective == Objective() else linear_divergence("reverse_kl", *models)[0]
    report = TeacherReport(
        name=teacher.name,
        tokens=len(rows_NH),
        divergence=found.value_N.mean().item(),
        top1_agreement=found.same_top_N.float().mean().item(),
        student_entropy=found.student_entropy_N.mean().item(),
        teacher_entropy=found.teacher_entropy_N.mean().item(),
        reverse_kl=reverse_N.mean().item(),
        divergence_N=found.value_N,
    )
    return report, found.student_gradient_NH, found.head_gradient_VH
