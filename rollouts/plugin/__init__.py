"""Our DeepSeek-V4 inside vLLM: the trainer's own modules over vLLM's paged caches.

vLLM finds `register` through the entry point group `vllm.general_plugins`; nothing in vLLM is patched on disk.
The architecture has a `model_type` of its own, because vLLM gives `deepseek_v4` a special treatment (block sizes,
tokenizer mode, config class) that belongs to its in-tree model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ARCHITECTURE = "PosttrainDeepseekV4ForCausalLM"
MODEL_TYPE = "posttrain_deepseek_v4"
LOAD_FORMAT = "posttrain"


def register() -> None:
    """Make vLLM know config, architecture and loader. Called in every vLLM process; safe to repeat."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader

    from rollouts.plugin.config import PosttrainDeepseekV4Config
    from rollouts.plugin.loader import CheckpointLoader

    AutoConfig.register(MODEL_TYPE, PosttrainDeepseekV4Config, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"rollouts.plugin.model:{ARCHITECTURE}")
        register_model_loader(LOAD_FORMAT)(CheckpointLoader)


def write_engine_config(v4_config: dict[str, Any], directory: str | Path) -> None:
    """Write the `config.json` that vLLM starts our model from (no weights: they come from the publisher).

    Args:
        v4_config: fields of a DeepSeek-V4 `config.json`.
        directory: created if need be.
    """
    from posttrain.files import atomic_write
    from rollouts.plugin.config import engine_fields

    atomic_write(Path(directory) / "config.json", json.dumps(engine_fields(v4_config), indent=2))
