"""Divergences against a dense float64 oracle, one head at a time, and the teachers."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.divergence import BETA, TeacherRows, divergence, forward_kl, jsd, one_head_at_a_time, reverse_kl
from distill.objective import Objective
from distill.store import joined
from distill.teacher import TeacherWorker
from posttrain.errors import BadInput
from tests.trainers_kit import save, tiny_model, tokens

N, H, G, V = 37, 24, 40, 5003


def oracle(kind: str, student_NH: Tensor, head_VH: Tensor, teacher_NG: Tensor, teacher_head_VG: Tensor) -> Tensor:
    """The divergence from dense logits, in float64, by the definitions."""
    p = torch.log_softmax(student_NH.double() @ head_VH.double().T, dim=-1)
    q = torch.log_softmax(teacher_NG.double() @ teacher_head_VG.double().T, dim=-1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(dim=-1)
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(dim=-1)
    mean = (0.5 * (p.exp() + q.exp())).log()
    return 0.5 * (p.exp() * (p - mean)).sum(dim=-1) + 0.5 * (q.exp() * (q - mean)).sum(dim=-1)


def tensors(seed: int = 0, size: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size, H), (V, H), (size, G), (V, G)]
    student_NH, head_VH, teacher_NG, teacher_head_VG = (torch.randn(s, generator=generator) * 0.5 for s in shapes)
    return student_NH.requires_grad_(), head_VH.requires_grad_(), teacher_NG, teacher_head_VG


@pytest.mark.parametrize(("kind", "function"), [("reverse_kl", reverse_kl), ("forward_kl", forward_kl), ("jsd", jsd)])
def test_value_and_gradient_are_the_dense_ones(kind: str, function) -> None:  # type: ignore[no-untyped-def]
    inputs = tensors()
    weights_N = torch.linspace(0.1, 2, N)
    values = function(*inputs)
    (values * weights_N).sum().backward()
    dense = tensors()
    expected = oracle(kind, *dense)
    (expected * weights_N).sum().backward()
    assert (values - expected).abs().max() < 1e-5
    for ours, theirs in zip(inputs[:2], dense[:2], strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-5


def test_the_gradient_in_the_logits_has_the_closed_form() -> None:
    _, _, teacher_NG, teacher_head_VG = tensors()
    logits_NV = torch.randn(N, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    identity, teacher_head = torch.eye(H), teacher_head_VG[:H]
    value_N = reverse_kl(logits_NV, identity, teacher_NG, teacher_head)
    value_N.sum().backward()
    p = torch.log_softmax(logits_NV.detach(), dim=-1)
    q = torch.log_softmax(teacher_NG @ teacher_head.T, dim=-1)
    closed_form = p.exp() * ((p - q) - value_N.detach()[:, None])
    assert (logits_NV.grad - closed_form).abs().max() < 1e-5


def test_a_teacher_equal_to_the_student_is_no_distance_away() -> None:
    student_NH, head_VH, _, _ = tensors()
    for kind in BETA:
        value_N, _ = divergence(kind, student_NH, head_VH, student_NH.detach(), head_VH.detach())
        assert value_N.abs().max() < 1e-6


def test_another_vocabulary_is_refused_with_both_sizes() -> None:
    student_NH, head_VH, teacher_NG, teacher_head_VG = tensors()
    with pytest.raises(BadInput, match=r"vocabulary of 5000 tokens, the student one of 5003"):
        divergence("reverse_kl", student_NH, head_VH, teacher_NG, teacher_head_VG[:5000])


def rows_of(name: str, rows: slice, weight: float, hidden: Tensor, head: Tensor) -> TeacherRows:
    return TeacherRows(name, rows, weight, lambda: hidden[rows], lambda: head)


def test_two_teachers_in_a_batch_weigh_as_each_alone() -> None:
    student_NH, head_VH, teacher_NG, first_head = tensors()
    second_head = tensors(seed=1)[3]
    first, second = slice(0, 12), slice(12, N)
    teachers = [
        rows_of("a", first, 0.3, teacher_NG, first_head),
        rows_of("b", second, 0.7, teacher_NG, second_head),
    ]
    loss, reports = one_head_at_a_time(Objective(), student_NH, head_VH, teachers)
    (2 * loss).backward()

    alone = tensors()
    expected = 0.3 * oracle("reverse_kl", alone[0][first], alone[1], teacher_NG[first], first_head).mean()
    expected = expected + 0.7 * oracle("reverse_kl", alone[0][second], alone[1], teacher_NG[second], second_head).mean()
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (student_NH.grad - alone[0].grad).abs().max() < 1e-6
    assert (head_VH.grad - alone[1].grad).abs().max() < 1e-6
    assert [(report.name, report.tokens) for report in reports] == [("a", 12), ("b", 25)]
    assert loss.item() == pytest.approx(0.3 * reports[0].divergence + 0.7 * reports[1].divergence, abs=1e-6)


def test_only_one_head_is_alive_at_a_time() -> None:
    student_NH, head_VH, teacher_NG, _ = tensors()
    alive: list[weakref.ref[Tensor]] = []
    counts = []

    def head() -> Tensor:
        counts.append(sum(reference() is not None for reference in alive))
        tensor = torch.randn(V, G)
        alive.append(weakref.ref(tensor))
        return tensor

    bounds = [(0, 10), (10, 20), (20, N)]
    teachers = [TeacherRows(str(a), slice(a, b), 1.0, lambda a=a, b=b: teacher_NG[a:b], head) for a, b in bounds]
    loss, _ = one_head_at_a_time(Objective(), student_NH, head_VH, teachers)
    assert counts == [0, 0, 0]
    assert all(reference() is None for reference in alive)  # none of them waits for the backward pass
    loss.backward()
    assert student_NH.grad.abs().sum() > 0


SEQUENCES = [list(tokens(text)) for text in ("hello world", "a?", "1234567890123456789", "abc")]
KEPT = [5, 1, 12, 2]


def states_of(teacher: TeacherWorker, path: str, rows: slice = slice(None), dtype: str | None = None) -> Tensor:
    work, *blocks = teacher.hidden_states(path, SEQUENCES[rows], KEPT[rows], dtype)
    assert work.bytes_returned == sum(block.nbytes for block in blocks)
    return joined(path, KEPT[rows], blocks)


def test_a_teachers_states_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = tiny_model(0)
    teacher = TeacherWorker("hf", budget_bytes=1 << 30)
    states = states_of(teacher, save(model, tmp_path / "t"))
    expected = []
    for sequence, kept in zip(SEQUENCES, KEPT, strict=True):
        state = model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0, :-1]
        expected.append(state[-kept:])
    assert states.shape == (sum(KEPT), model.config.hidden_size)
    assert (states - torch.cat(expected)).abs().max() < 1e-5


def test_states_times_head_are_the_teachers_logits(tmp_path: Path) -> None:
    model, teacher = tiny_model(0), TeacherWorker("hf", budget_bytes=1 << 30)
    path = save(model, tmp_path / "t")
    states = states_of(teacher, path, slice(1))
    logits = model(input_ids=torch.tensor(SEQUENCES[:1])).logits[0, -KEPT[0] - 1 : -1]
    assert (states @ teacher.head(path).tensor().T - logits).abs().max() < 1e-5


def test_long_batches_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tiny_model(0), tmp_path / "t")
    teacher = TeacherWorker("hf", budget_bytes=1 << 30)
    together = states_of(teacher, path)
    monkeypatch.setattr("distill.prefill.TOKENS_PER_FORWARD", 24)
    apart = states_of(teacher, path)
    assert (together - apart).abs().max() < 1e-5


def test_the_teacher_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    paths = [save(tiny_model(seed), tmp_path / str(seed)) for seed in range(3)]
    size = sum(parameter.numel() * 4 for parameter in tiny_model(0).parameters())
    teacher = TeacherWorker("hf", budget_bytes=2 * size)
    for path in (paths[0], paths[1], paths[0], paths[2]):
        teacher.head(path)
    assert teacher.loaded() == [paths[0], paths[2]]


def test_a_teacher_beyond_the_budget_is_held_alone(tmp_path: Path) -> None:
    paths = [save(tiny_model(seed), tmp_path / str(seed)) for seed in range(2)]
    teacher = TeacherWorker("hf", budget_bytes=1)
    for path in paths:
        teacher.head(path)
        assert teacher.loaded() == [path]


def test_a_directory_without_a_model_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a model checkpoint"):
        TeacherWorker("hf", budget_bytes=1).head(str(tmp_path))
