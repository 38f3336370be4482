"""Objectives beside the exact divergences, against dense float64; several teachers for a row; rounded states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.divergence import TeacherReport, TeacherRows, one_head_at_a_time
from distill.objective import Objective
from tests.test_distill import N, V, oracle, tensors

TOKENS_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))


def distributions(inputs: tuple[Tensor, Tensor, Tensor, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """log p and log q, dense, in float64."""
    student_NH, head_VH, teacher_NG, teacher_head_VG = (tensor.double() for tensor in inputs)
    return (
        torch.log_softmax(student_NH @ head_VH.T / temperature, dim=-1),
        torch.log_softmax(teacher_NG @ teacher_head_VG.T / temperature, dim=-1),
    )


def ours(objective: Objective, weights: tuple[float, ...] = (1.0,)) -> tuple[Tensor, list[TeacherReport], list[Tensor]]:
    """Loss, reports and gradients in the student's states and head; teacher i has the head of seed i."""
    student_NH, head_VH, teacher_NG, _ = tensors()
    teachers = [
        TeacherRows(str(i), slice(0, N), weight, lambda: teacher_NG, lambda i=i: tensors(seed=i)[3])
        for i, weight in enumerate(weights)
    ]
    loss, reports = one_head_at_a_time(objective, student_NH, head_VH, teachers, TOKENS_N)
    loss.backward()
    return loss.detach(), reports, [student_NH.grad, head_VH.grad]


def assert_gradients(found: list[Tensor], surrogate_N: Tensor, inputs: tuple[Tensor, ...]) -> None:
    surrogate_N.mean().backward()
    for mine, dense in zip(found, inputs[:2], strict=True):
        assert (mine - dense.grad).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_a_temperature_divides_both_models_logits(kind: str) -> None:
    loss, _, gradients = ours(Objective(kind, temperature=2.5))
    dense = tensors()
    expected_N = oracle(kind, dense[0] / 2.5, dense[1], dense[2] / 2.5, dense[3])
    assert loss.item() == pytest.approx(expected_N.mean().item(), abs=1e-6)
    assert_gradients(gradients, expected_N, dense)


def test_the_mixture_of_jsd_can_lean_towards_the_teacher() -> None:
    loss, _, gradients = ours(Objective("jsd", beta=0.8))
    dense = tensors()
    log_p, log_q = distributions(dense, 1.0)
    log_m = (0.2 * log_p.exp() + 0.8 * log_q.exp()).log()
    expected_N = 0.2 * (log_p.exp() * (log_p - log_m)).sum(-1) + 0.8 * (log_q.exp() * (log_q - log_m)).sum(-1)
    assert loss.item() == pytest.approx(expected_N.mean().item(), abs=1e-6)
    assert_gradients(gradients, expected_N, dense)


def lumped_kl(log_a: Tensor, log_b: Tensor, kept: Tensor) -> Tensor:
    """KL(a || b) over the kept tokens and the rest as one outcome, by the definition."""
    a, b = (log.exp().gather(-1, kept) for log in (log_a, log_b))
    a, b = (torch.cat((kept, 1 - kept.sum(-1, keepdim=True)), -1) for kept in (a, b))
    return (a * (a / b).log()).sum(-1)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("top_k", [1, 32])
def test_top_k_keeps_the_teachers_tokens_and_lumps_the_others(kind: str, top_k: int) -> None:
    dense = tensors()
    log_p, log_q = distributions(dense, 1.5)
    kept = log_q.topk(top_k).indices
    expected_N = lumped_kl(log_p, log_q, kept) if kind == "reverse_kl" else lumped_kl(log_q, log_p, kept)
    loss, (report,), gradients = ours(Objective(kind, temperature=1.5, top_k=top_k))
    assert loss.item() == pytest.approx(expected_N.mean().item(), abs=1e-6)
    assert_gradients(gradients, expected_N, dense)
    exact, (whole,), _ = ours(Objective(kind, temperature=1.5))
    assert 0 < loss < exact  # a lower bound
    assert report.student_entropy == pytest.approx(whole.student_entropy, abs=1e-5)
    assert report.teacher_entropy == pytest.approx(whole.teacher_entropy, abs=1e-5)
    assert report.top1_agreement == whole.top1_agreement


def test_all_tokens_kept_is_the_exact_divergence() -> None:
    some, _, gradients = ours(Objective(top_k=V + 5))
    exact, _, expected = ours(Objective())
    assert some.item() == pytest.approx(exact.item(), abs=1e-6)
    for mine, dense in zip(gradients, expected, strict=True):
        assert (mine - dense).abs().max() < 1e-6


def test_mass_outside_the_kept_tokens_is_not_free() -> None:
    """A student that puts nearly everything on a token beyond the teacher's top k pays for it."""
    student_NV, teacher_NV = torch.zeros(1, 50), torch.zeros(1, 50)
    teacher_NV[0, 3], student_NV[0, 40] = 8.0, 12.0
    identity = torch.eye(50)
    rows = [TeacherRows("t", slice(0, 1), 1.0, lambda: teacher_NV, lambda: identity)]
    loss, _ = one_head_at_a_time(Objective(top_k=1), student_NV.requires_grad_(), identity, rows)
    assert loss > 3


def test_the_sampled_token_gives_the_policy_gradient_of_the_reverse_kl() -> None:
    loss, _, gradients = ours(Objective("sampled_token"))
    dense = tensors()
    log_p, log_q = (log.gather(-1, TOKENS_N[:, None])[:, 0] for log in distributions(dense, 1.0))
    assert loss.item() == pytest.approx((log_p - log_q).mean().item(), abs=1e-5)
    assert_gradients(gradients, -(log_q - log_p).detach() * log_p, dense)


def test_the_sampled_tokens_gradient_is_right_in_the_mean() -> None:
    """Weighted with the student's probabilities of all tokens, it is the gradient of the exact reverse KL."""
    generator = torch.Generator().manual_seed(2)
    student_V, teacher_V = (torch.randn(1, 11, generator=generator).requires_grad_() for _ in range(2))
    identity, total = torch.eye(11), torch.zeros(1, 11)
    for token, share in enumerate(torch.softmax(student_V.detach()[0], dim=-1)):
        rows = [TeacherRows("t", slice(0, 1), 1.0, lambda: teacher_V.detach(), lambda: identity)]
        student_V.grad = None
        loss, _ = one_head_at_a_time(Objective("sampled_token"), student_V, identity, rows, torch.tensor([token]))
        loss.backward()
        total += share * student_V.grad
    exact = oracle("reverse_kl", student_V, identity, teacher_V.detach(), identity)
    assert (total - torch.autograd.grad(exact.sum(), student_V)[0]).abs().max() < 1e-6


def test_the_control_pushes_every_sampled_token_down_whatever_the_teacher_says() -> None:
    loss, _, gradients = ours(Objective("fixed_negative"))
    estimate, _, _ = ours(Objective("sampled_token"))
    assert loss == estimate  # what is reported
    dense = tensors()
    log_p = distributions(dense, 1.0)[0].gather(-1, TOKENS_N[:, None])[:, 0]
    assert_gradients(gradients, log_p, dense)


@pytest.mark.parametrize("objective", [Objective(), Objective(top_k=8), Objective("sampled_token")])
def test_several_teachers_of_the_same_rows_add_up(objective: Objective) -> None:
    loss, reports, gradients = ours(objective, (0.7, 0.3))
    first, _, of_first = ours(objective, (0.7,))
    assert [report.tokens for report in reports] == [N, N]
    assert loss.item() == pytest.approx(0.7 * reports[0].divergence + 0.3 * reports[1].divergence, abs=1e-6)
    second = 0.3 * reports[1].divergence
    assert loss.item() == pytest.approx(first.item() + second, abs=1e-6)
    dense = tensors()
    if objective == Objective():
        expected_N = 0.7 * oracle("reverse_kl", *dense)
        expected_N = expected_N + 0.3 * oracle("reverse_kl", *dense[:3], tensors(seed=1)[3])
        assert_gradients(gradients, expected_N, dense)
    assert all(not torch.equal(both, one) for both, one in zip(gradients, of_first, strict=True))


def test_many_tiles_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together = ours(Objective(top_k=8))
    monkeypatch.setattr("distill.objective.tile_tokens", lambda vocabulary, device: 5)
    apart = ours(Objective(top_k=8))
    assert torch.allclose(together[0], apart[0], atol=1e-6)
    for mine, other in zip(together[2], apart[2], strict=True):
        assert (mine - other).abs().max() < 1e-6
