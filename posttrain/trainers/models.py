"""Model checkpoints for the trainers: load, save, and the weights that go to the samplers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import BadInput
from posttrain.files import atomic_directory
from posttrain.kernels.gradients import accumulate_in_place
from posttrain.trainers.lora import has_adapters, merged_state, save_adapters


def load_model(family: str, path: str | Path) -> PreTrainedModel:
    """The causal language model in the directory `path`, ready for training: in float32, or as its precision says.

    `deepseek_v4` is this project's own implementation. It has to be named here: transformers has a model of the
    same architecture name, which its Auto classes and TRL would silently take instead.
    """
    if not (Path(path) / "config.json").is_file():
        raise BadInput(f"{path} is not a model checkpoint: there is no config.json in it")
    if family == "deepseek_v4":
        from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM

        model = DeepseekV4ForCausalLM.from_pretrained(path)
        if torch.cuda.is_available():
            accumulate_in_place(model)
    else:
        options = {"dtype": torch.float32, "device_map": None, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(path, **options)
        if missing := sorted(info["missing_keys"]):  # transformers would train on with random values
            names = ", ".join(missing[:5])
            raise BadInput(f"{path}: its files lack {len(missing)} of the model's tensors: {names}")
    if getattr(model, "generation_config", None) is None:
        # TRL writes the pad token into it and reads the end-of-sequence tokens from it
        model.generation_config = GenerationConfig(eos_token_id=model.config.eos_token_id)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. TRL needs it for the pad and end-of-sequence ids."""
    return AutoTokenizer.from_pretrained(path)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Write model and tokenizer to the directory `path`, which appears only when it is complete.

    Adapters are merged into the weights, so that whatever reads a checkpoint needs not know of them, and are saved in
    the directory `adapter` beside.
    """
    with atomic_directory(path) as directory:
        if has_adapters(model):
            model.save_pretrained(directory, state_dict=merged_state(model))
            save_adapters(model, directory / "adapter")
        else:
            model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def distillation_obstacle(model: PreTrainedModel) -> str | None:
    """Why the logits of `model` are not its last hidden states times its head's weight; None when they are."""
    config = model.config.get_text_config()
    if getattr(model.get_output_embeddings(), "bias", None) is None and not getattr(
        config, "final_logit_softcapping", None
    ):
        return None
    return (
        "distillation rebuilds the logits as hidden states times the head's weight; "
        f"{type(model).__name__} adds a bias or caps its logits, which is not supported"
    )


def publishable_weights(model: PreTrainedModel) -> dict[str, np.ndarray | torch.Tensor]:
    """The weights under the names that a sampling engine loads, as views of the live parameters (no copy).

    A model whose engine uses other names says so in `engine_state_dict()`. bf16, which numpy lacks, stays a tensor.
    Weights with adapters come merged, as tensors of their own.
    """
    named = merged_state(model) if has_adapters(model) else model.state_dict()
    if hasattr(model, "engine_state_dict"):
        named = model.engine_state_dict(named)
    weights = {name: tensor.detach().cpu() for name, tensor in named.items()}
    return {name: tensor if tensor.dtype is torch.bfloat16 else tensor.numpy() for name, tensor in weights.items()}
