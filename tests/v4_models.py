"""Random tiny V4 models for the tests, ours and transformers', with weights large enough that mistakes show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4Config
from transformers import DeepseekV4ForCausalLM as TransformersV4

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.models.deepseek_v4.presets import PRESETS

VOCABULARY = 97


def randomise(model: torch.nn.Module, std: float = 0.1) -> None:
    """Random weights everywhere, norms and gates around 1, hash tables with distinct experts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("scale"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(std * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                vocabulary, k = buffer.shape
                buffer.copy_(torch.rand(vocabulary, 8).argsort(1)[:, :k])
            elif name.endswith(("e_score_correction_bias", "gate.bias")):
                buffer.copy_(0.1 * torch.randn_like(buffer))


def transformers_model(seed: int, **fields: Any) -> TransformersV4:
    """transformers' V4 with random weights."""
    torch.manual_seed(seed)
    model = TransformersV4(DeepseekV4Config(vocab_size=VOCABULARY, **{**PRESETS["tiny"], **fields})).eval()
    randomise(model)
    return model


def our_model(seed: int, **fields: Any) -> DeepseekV4ForCausalLM:
    """Our V4 with random weights."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(make_config({"preset": "tiny", **fields}, vocab_size=VOCABULARY)).eval()
    randomise(model)
    return model


def saved_twin(model: TransformersV4, directory: Path) -> DeepseekV4ForCausalLM:
    """Our model with the weights of transformers', read from what transformers saved."""
    model.save_pretrained(directory)
    return DeepseekV4ForCausalLM.from_pretrained(directory)
