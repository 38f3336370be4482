"""The recipe's `optimizer:` block as a torch optimizer and a learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from posttrain.optim.muon import Muon
from posttrain.recipe.stages import OptimizerConfig

MUON_MOMENTUM = 0.95
MUON_ADAMW_EPS = 1e-20
"""V4's epsilon: the update does not shrink with the gradient's scale."""


def build_optimizer(
    model: PreTrainedModel, config: OptimizerConfig, steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer over the trainable parameters of `model`, and its schedule over `steps` updates."""
    build = _build_muon if config.name == "muon" else _build_adamw
    optimizer = build(model, config)
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)
    return optimizer, scheduler


def _build_adamw(model: PreTrainedModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _build_muon(model: PreTrainedModel, config: OptimizerConfig) -> Muon:
    """V4's division: Muon for the matrices; AdamW for embedding, head, norms, biases, gates and sinks."""
    matrices: list[nn.Parameter] = []
    blocks: list[int] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_muon_matrix(model, name, parameter):
            matrices.append(parameter)
            blocks.append(stacked_matrices(model, name))
        else:
            others.append(parameter)
    groups = [
        {
            "kind": "muon",
            "params": matrices,
            "blocks": blocks,
            "lr": config.lr,
            "momentum": MUON_MOMENTUM,
            "weight_decay": config.weight_decay,
        },
        {
            "kind": "adamw",
            "params": others,
            "lr": config.adamw_lr if config.adamw_lr is not None else config.lr,
            "betas": config.betas,
            "eps": MUON_ADAMW_EPS,
            "weight_decay": config.weight_decay,
        },
    ]
    return Muon(group for group in groups if group["params"])


def is_muon_matrix(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates this parameter: a matrix (or a stack) that maps activations to activations.

    Embedding and head are tables over the vocabulary, a compressor's `ape` is one over positions.
    """
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return parameter.ndim >= 2 and not name.endswith(".ape") and not any(parameter is table for table in tables)


def stacked_matrices(model: PreTrainedModel, name: str) -> int:
    """How many matrices this parameter stacks along its rows: gate over up, or one for each of V4's output groups."""
    if name.endswith((".w13", "gate_up_proj")):
        return 2
    return int(model.config.o_groups) if name.endswith(".wo_a.weight") else 1
