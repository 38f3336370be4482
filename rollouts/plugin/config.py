"""What vLLM reads of our model: a few sizes on top, the whole V4 configuration nested below."""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV4Config, PretrainedConfig

from rollouts.plugin import ARCHITECTURE, MODEL_TYPE

SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "head_dim",
)


def engine_fields(v4_config: dict[str, Any]) -> dict[str, Any]:
    """The engine's `config.json` from a V4 `config.json`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "num_key_value_heads": 1,
        "dtype": "float32",
        **{key: v4_config[key] for key in SHARED},
        **{key: v4_config.get(key) for key in ("bos_token_id", "eos_token_id")},
        "v4": v4_config,
    }


class PosttrainDeepseekV4Config(PretrainedConfig):
    """`v4` holds the model's configuration; the rest is what vLLM asks any model for."""

    model_type = MODEL_TYPE
    v4: dict[str, Any] | None = None

    def v4_config(self) -> DeepseekV4Config:
        """The configuration that the model is built from."""
        return DeepseekV4Config.from_dict(dict(self.v4 or {}))
