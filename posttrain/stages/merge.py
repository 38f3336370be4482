"""What the student starts from: the base, or the experts merged into one model.

    average             mean over experts of theta_i                          (model soups, arXiv:2203.05482)
    task arithmetic     theta_base + s * sum over experts of (theta_i - theta_base)           (arXiv:2212.04089)

`average` is task arithmetic with s = 1 / the number of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.recipe.stages import OpdStage
from posttrain.rundir import MERGED
from posttrain.stages.work import Work
from posttrain.trainers.models import load_model, load_tokenizer, save_checkpoint


def student_start(work: Work, config: OpdStage, base: Path, experts: dict[str, Path]) -> Path:
    """The checkpoint that the student starts from; a merged one is made once and kept."""
    if config.init == "base":
        return base
    path = work.run.checkpoint_path(MERGED)
    if not path.is_dir():
        scale = config.init_scale or 1 / len(experts)
        merge(work.recipe.model.family, base, list(experts.values()), scale, path)
    return path


@torch.no_grad()
def merge(family: str, base: Path, experts: Sequence[Path], scale: float, output: Path) -> None:
    """Write base + scale * sum(expert - base), with the base's tokenizer; two models are in memory at a time.

    Sums are in fp64; what is not floating-point (tables of token ids) stays the base's.
    """
    model = load_model(family, base)
    weights = {name: tensor for name, tensor in _tensors(model) if tensor.is_floating_point()}
    changes = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in weights.items()}
    for path in experts:
        theirs = dict(_tensors(load_model(family, path)))
        for name, tensor in weights.items():
            changes[name] += theirs[name].double() - tensor.double()
    for name, tensor in weights.items():
        tensor.copy_(tensor.double() + scale * changes[name])
    save_checkpoint(model, load_tokenizer(base), output)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers; a tied one once."""
    return chain(model.named_parameters(), model.named_buffers())
