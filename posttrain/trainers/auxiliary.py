"""The recipe's `auxiliary:` block in training: indexers and routers get what the main loss does not give them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import BadInput
from posttrain.recipe.stages import AuxiliaryConfig, SftAuxiliaryConfig
from posttrain.trainers.progress import Progress


class AuxiliaryObjectives(TrainerCallback):
    """What a trainer adds to its loss (`auxiliary` of `trl_seam.WithAuxiliary`), and the callback that moves biases."""

    def __init__(self, model: PreTrainedModel, config: AuxiliaryConfig, progress: Progress) -> None:
        from posttrain.models.deepseek_v4.auxiliary import Auxiliary, indexer_parameters

        self.backbone = model.base_model
        self.progress = progress
        self.apart: list[nn.Parameter] = indexer_parameters(model) if config.indexer else []
        self.objectives = Auxiliary(
            indexer=config.indexer,
            balance=config.balance,
            bias_update=config.bias_update,
            all_candidates=warms_up(config),
        )

    def take_loss(self) -> Tensor | None:
        """The weighted sum for the forward pass that the trainer's loss comes from."""
        loss, values = self.objectives.take_loss()
        for name, value in values.items():
            self.progress.add(name, value)
        return loss

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the routers' biases, and report the loads of the step."""
        violations = []
        for layer, load_E in self.objectives.update_biases(self.backbone).items():
            mean = load_E.sum().item() / len(load_E)
            largest, smallest = load_E.max().item(), load_E.min().item()
            self.progress.add(f"router_load_max/{layer}", largest)
            self.progress.add(f"router_load_min/{layer}", smallest)
            violations.append(largest / max(mean, 1e-9))
            self.progress.add(f"router_violation/{layer}", violations[-1])
        if violations:
            self.progress.add("router_violation", max(violations))


def warms_up(config: AuxiliaryConfig) -> bool:
    """Whether this is V3.2's dense warm-up: indexers alone learn, over all candidates."""
    return isinstance(config, SftAuxiliaryConfig) and config.indexer_phase == "warmup"


@contextmanager
def auxiliary_objectives(
    model: PreTrainedModel, config: AuxiliaryConfig, progress: Progress, stage: str
) -> Iterator[AuxiliaryObjectives | None]:
    """The objectives of `config` on `model` while it trains; None, and a model as it was, when none is on.

    Enter before the optimizer is built: in the warm-up only the indexers' parameters are left to train.

    Raises:
        BadInput: the model has no part that one of the objectives could train.
    """
    if not config.any_on:
        yield None
        return
    if problem := _obstacle(model, config):
        raise BadInput(f"stage {stage}: {problem}")
    objectives = AuxiliaryObjectives(model, config, progress)
    kept = {id(parameter) for parameter in objectives.apart}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept] if warms_up(config) else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    objectives.backbone.auxiliary = objectives.objectives
    try:
        yield objectives
    finally:
        objectives.backbone.auxiliary = None
        for parameter in frozen:
            parameter.requires_grad_(True)


def _obstacle(model: PreTrainedModel, config: AuxiliaryConfig) -> str | None:
    """Why the model cannot have these objectives; None when it can."""
    from posttrain.models.deepseek_v4.auxiliary import indexer_parameters
    from posttrain.models.deepseek_v4.model import DeepseekV4Model

    if not isinstance(model.base_model, DeepseekV4Model):
        return f"auxiliary objectives are for family deepseek_v4; the model is a {type(model).__name__}"
    if config.indexer and not indexer_parameters(model):
        return "auxiliary.indexer is on, but no layer of the model is of type compressed_sparse_attention"
    if (config.balance or config.bias_update) and all(layer.ffn.gate.hashed for layer in model.base_model.layers):
        return "auxiliary.balance or bias_update is on, but every router of the model is a frozen hash table"
    return None
