"""LoRA by PEFT: adapters inside the model, whose own weights stay as they are (docs/lora.md).

Our own model computes with `W + (alpha / rank) B A` as a matrix, as an engine does that was given the merged weights,
so trainer and sampler agree as they do in full training. A model of transformers adds the adapter's output to the
layer's, which is less to compute and differs from the merged weights by rounding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import BadInput
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.presets import LORA_DEFAULT, LORA_TARGETS
from posttrain.recipe.stages import LoraConfig

ADAPTER = "default"
PREFIX = "base_model.model."
"""Of tensors in the files of PEFT."""


def add_adapters(model: PreTrainedModel, config: LoraConfig, stage: str) -> None:
    """Put fp32 adapters into `model`, in place; they are all that can be trained afterwards, and change nothing yet.

    Raises:
        BadInput: a target that the model does not have, or that cannot have an adapter.
    """
    options = {"r": config.rank, "lora_alpha": config.alpha, "base_model_name_or_path": model.name_or_path or None}
    if isinstance(model, DeepseekV4ForCausalLM):
        parameters = [end for target in config.targets or LORA_DEFAULT for end in LORA_TARGETS[target]]
        peft = PeftConfig(target_modules=[], target_parameters=parameters, **options)
    else:
        peft = PeftConfig(target_modules=_modules(model, config, stage), **options)
    inject_adapter_in_model(peft, model, ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:  # in bf16 small updates would be lost
            parameter.data = parameter.data.float()


def _modules(model: PreTrainedModel, config: LoraConfig, stage: str) -> list[str]:
    """Full names of the linear layers that the targets name; the head and tied embeddings stay as they are."""
    head = model.get_output_embeddings()
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
    if config.targets is None:
        return linear
    for index, target in enumerate(config.targets):
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise BadInput(
                f"stage {stage}: lora.targets[{index}]: {type(model).__name__} has no linear layer {target!r} below "
                f"its head; there are {', '.join(known)}"
            )
    ends = tuple(f".{target}" for target in config.targets)
    return [name for name in linear if name in config.targets or name.endswith(ends)]


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was there."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without adapters that computes the same: names, and `W + (alpha / rank) B A`.

    What has no adapter is a view of the model's own.
    """
    state = {
        _plain(name): tensor
        for name, tensor in model.state_dict().items()
        if not any(part.startswith("lora_") for part in name.split("."))
    }
    # The trainers' forward passes on a GPU run under autocast, which the product of the factors is subject to.
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
        for name, module in model.named_modules():
            if isinstance(module, ParamWrapper):
                state[_plain(f"{name}.{module.parameter_name}")] = _merged(module, module.get_param())
            elif isinstance(module, Linear):
                state[_plain(f"{name}.weight")] = _merged(module, module.get_base_layer().weight)
    return state


def _merged(layer: ParamWrapper | Linear, weight: Tensor) -> Tensor:
    """To the last bit what PEFT computes in a forward pass of a `ParamWrapper`: for experts in one operation."""
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        left, right, scale = layer.get_delta_factors(ADAPTER)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight.detach(), left, right, alpha=scale)
    return weight.detach() + layer.get_delta_weight(ADAPTER).to(weight.dtype)


def _plain(name: str) -> str:
    """A name without the wrappers that PEFT puts around a layer."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def save_adapters(model: PreTrainedModel, directory: Path) -> None:
    """Write the adapters as PEFT does: `PeftModel.from_pretrained(model that they were added to, directory)`."""
    directory.mkdir()
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    save_file(
        {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    model.peft_config[ADAPTER].save_pretrained(str(directory))
