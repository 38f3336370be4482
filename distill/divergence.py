"""Exact divergences between student and teacher over the whole vocabulary, from hidden states and heads.

On-policy distillation minimises (DeepSeek-V4 report, eq. 29)

    L(theta) = sum_i w_i KL( pi_theta || pi_Ei ),   on samples of pi_theta.

With student logits z, teacher logits u, p = softmax(z), q = softmax(u), a position contributes

    KL             = sum_v p_v (z_v - u_v) - lse(z) + lse(u)
    d KL / d z_k   = p_k [ (log p_k - log q_k) - KL ].

Neither logits are ever held in full: TRL's `ChunkedDivergenceFunction` walks over tiles of [4096 tokens, 32768
entries]. Several teachers are worked off one after the other by `one_head_at_a_time`, each with its own head, so
that no two heads are in memory at once (section 5.2.2 of the report).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from posttrain.errors import BadInput

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
BETA: dict[Divergence, float] = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}
"""The divergence as a point of the generalised Jensen-Shannon family, mixture (1 - beta) p + beta q."""

TOKEN_TILE = 1024
VOCABULARY_TILE = 8192


def divergence(
    kind: Divergence, student_NH: Tensor, student_head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor
) -> tuple[Tensor, Tensor]:
    """Divergence and the student's entropy at each position, in nats; two tensors of shape [N].

    `student_NH` and `teacher_NG` are last hidden states (after the final norm) of the same N positions; the widths
    H and G may differ, the vocabulary V may not. Gradients reach the student's hidden states and head only.
    Raises BadInput when the vocabularies differ.
    """
    if student_head_VH.size(0) != teacher_head_VG.size(0):
        raise BadInput(vocabulary_mismatch("the teacher", teacher_head_VG.size(0), student_head_VH.size(0)))
    return ChunkedDivergenceFunction.apply(
        student_NH, student_head_VH, None, teacher_NG, teacher_head_VG, None, BETA[kind]
    )


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


def one_head_at_a_time(
    kind: Divergence, student_NH: Tensor, student_head_VH: Tensor, teachers: Sequence[TeacherRows]
) -> tuple[Tensor, list[TeacherReport]]:
    """The loss  sum_i weight_i * mean over teacher i's rows of the divergence,  and a report on each teacher.

    The gradient of each term is taken as soon as the term is there, and its teacher's states and head are let go
    before the next are fetched. A head is freed only when the callables hand over the only reference to it.
    """
    reports: list[TeacherReport] = []
    return _OneHeadAtATime.apply(student_NH, student_head_VH, kind, teachers, reports), reports


class _OneHeadAtATime(torch.autograd.Function):
    """Computes the gradients in the forward pass: a graph over all teachers would keep every head until backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NH: Tensor,
        student_head_VH: Tensor,
        kind: Divergence,
        teachers: Sequence[TeacherRows],
        reports: list[TeacherReport],
    ) -> Tensor:
        hidden_NH = student_NH.detach().requires_grad_()
        head_VH = student_head_VH.detach().requires_grad_()
        hidden_NH.grad, head_VH.grad = torch.zeros_like(hidden_NH), torch.zeros_like(head_VH)
        total = torch.zeros((), dtype=torch.float32, device=student_NH.device)
        for teacher in teachers:
            total += _term(kind, hidden_NH, head_VH, teacher, reports)
        ctx.save_for_backward(hidden_NH.grad, head_VH.grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden_NH, grad_head_VH = ctx.saved_tensors
        return grad_hidden_NH * grad, grad_head_VH * grad, None, None, None


def _term(
    kind: Divergence, hidden_NH: Tensor, head_VH: Tensor, teacher: TeacherRows, reports: list[TeacherReport]
) -> Tensor:
    """One teacher's term; adds its gradient to the leaves `hidden_NH` and `head_VH`. Its tensors die with the call."""
    teacher_NG = teacher.hidden().to(hidden_NH.device)
    teacher_head_VG = teacher.head().to(hidden_NH.device)
    with torch.enable_grad():
        rows_NH = hidden_NH[teacher.rows]
        divergence_N, entropy_N = divergence(kind, rows_NH, head_VH, teacher_NG, teacher_head_VG)
        term = teacher.weight * divergence_N.mean()
        term.backward()
    with torch.no_grad():
        top1_N, teacher_entropy_N = compare(rows_NH, head_VH, teacher_NG, teacher_head_VG)
    reports.append(
        TeacherReport(
            name=teacher.name,
            tokens=divergence_N.numel(),
            divergence=divergence_N.mean().item(),
            top1_agreement=top1_N.float().mean().item(),
            student_entropy=entropy_N.mean().item(),
            teacher_entropy=teacher_entropy_N.mean().item(),
        )
    )
    return term.detach()


def compare(
    student_NH: Tensor, student_head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether both prefer the same token, and the teacher's entropy; two tensors of shape [N]. Works in tiles."""
    same, entropies = [], []
    for start in range(0, student_NH.size(0), TOKEN_TILE):
        tile = slice(start, start + TOKEN_TILE)
        student_top, _ = _summary(student_NH[tile], student_head_VH)
        teacher_top, entropy = _summary(teacher_NG[tile], teacher_head_VG)
        same.append(student_top == teacher_top)
        entropies.append(entropy)
    return torch.cat(same), torch.cat(entropies)


def _summary(hidden_NH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely token (the lowest on a tie) and entropy of each position, by an online softmax over tiles."""
    best_N = hidden_NH.new_full((hidden_NH.size(0),), -torch.inf)
    token_N = torch.zeros(hidden_NH.size(0), dtype=torch.long, device=hidden_NH.device)
    mass_N, weighted_N = torch.zeros_like(best_N), torch.zeros_like(best_N)
    for start in range(0, head_VH.size(0), VOCABULARY_TILE):
        logits_NV = hidden_NH @ head_VH[start : start + VOCABULARY_TILE].T
        top_N, index_N = logits_NV.max(dim=-1)
        token_N = torch.where(top_N > best_N, index_N + start, token_N)
        new_best_N = torch.maximum(best_N, top_N)
        rescale_N = torch.exp(best_N - new_best_N)
        exponentials_NV = torch.exp(logits_NV - new_best_N[:, None])
        mass_N = mass_N * rescale_N + exponentials_NV.sum(dim=-1)
        weighted_N = weighted_N * rescale_N + (exponentials_NV * logits_NV).sum(dim=-1)
        best_N = new_best_N
    return token_N, best_N + torch.log(mass_N) - weighted_N / mass_N
