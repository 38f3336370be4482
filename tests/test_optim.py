"""Muon and the optimizer that a recipe asks for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from posttrain.optim import Muon, build_optimizer
from posttrain.optim.build import is_muon_matrix
from posttrain.optim.muon import orthogonalize
from posttrain.recipe.stages import OptimizerConfig
from tests.trainers_kit import tiny_model


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
def test_an_update_is_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    singular_values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)))
    assert (singular_values - 1).abs().max() < 2e-3


def test_an_update_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, 24, 40)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert (orthogonalize(matrix) - u @ vh).abs().max() < 2e-3


def test_a_batch_of_matrices_is_treated_one_by_one() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(6, 16, 40) * torch.logspace(-6, 3, 6)[:, None, None]
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert (orthogonalize(matrices) - alone).abs().max() < 1e-5


def test_an_expert_without_gradient_stays_as_it_is() -> None:
    gradient = torch.randn(4, 8, 16)
    gradient[2] = 0
    update = orthogonalize(gradient)
    assert update[2].abs().max() == 0
    assert update.isfinite().all()


def muon(parameter: nn.Parameter, blocks: int = 1, lr: float = 0.1, decay: float = 0.0) -> Muon:
    group = {"kind": "muon", "params": [parameter], "blocks": [blocks], "lr": lr, "momentum": 0.95}
    return Muon([group | {"weight_decay": decay}])


def test_a_step_is_nesterov_momentum_scaled_to_its_rms_with_decoupled_decay() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(12, 20))
    optimizer = muon(parameter, lr=0.1, decay=0.5)
    expected, momentum = parameter.detach().clone(), torch.zeros(12, 20)
    for _ in range(3):
        gradient = torch.randn(12, 20)
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + gradient
        update = orthogonalize((gradient + 0.95 * momentum)[None])[0] * 0.18 * 20**0.5
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
    assert torch.allclose(parameter, expected, atol=1e-6)


def test_gate_and_up_are_two_matrices() -> None:
    torch.manual_seed(0)
    start, gradient = torch.zeros(3, 16, 24), torch.randn(3, 16, 24)
    fused = nn.Parameter(start.clone())
    fused.grad = gradient
    muon(fused, blocks=2).step()
    for half in (slice(0, 8), slice(8, 16)):
        alone = nn.Parameter(start[:, half].clone())
        alone.grad = gradient[:, half].contiguous()
        muon(alone).step()
        assert torch.allclose(fused[:, half], alone, atol=1e-6)


def test_the_part_that_is_not_matrices_follows_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = Muon([{"kind": "adamw", "params": [ours], **settings}])
    reference = torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn(7)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def test_matrices_go_to_muon_and_tables_norms_and_biases_to_adamw() -> None:
    model = tiny_model(0)
    names = {name for name, parameter in model.named_parameters() if is_muon_matrix(model, name, parameter)}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.1.mlp.down_proj.weight" in names
    assert not any(part in name for name in names for part in ("embed", "lm_head", "norm"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpointed_optimizer_goes_on_where_it_was(name: str) -> None:
    tokens = torch.randint(2, 40, (4, 12))
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1, schedule="cosine", warmup_steps=2)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
            optimizer.step()
            scheduler.step()

    model = tiny_model(0)
    optimizer, scheduler = build_optimizer(model, config, steps=8)
    steps(model, optimizer, scheduler, 3)
    twin = copy.deepcopy(model)
    twin_optimizer, twin_scheduler = build_optimizer(twin, config, steps=8)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_scheduler.load_state_dict(scheduler.state_dict())
    steps(model, optimizer, scheduler, 2)
    steps(twin, twin_optimizer, twin_scheduler, 2)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_schedule_moves_both_parts() -> None:
    model = tiny_model(0)
    config = OptimizerConfig(name="muon", lr=0.02, adamw_lr=0.001, schedule="linear", warmup_steps=2)
    optimizer, scheduler = build_optimizer(model, config, steps=6)
    rates = []
    for _ in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    factors = [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates == [pytest.approx([0.02 * factor, 0.001 * factor]) for factor in factors]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_model_learns_a_batch(name: str) -> None:
    model, tokens = tiny_model(0), torch.randint(2, 40, (8, 12))
    optimizer, _ = build_optimizer(model, OptimizerConfig(name=name, lr=0.01), steps=20)
    before = loss_of(model, tokens).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
    assert loss_of(model, tokens).item() < before / 2
