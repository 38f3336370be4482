"""DeepSeek-V4 on the op table."""

from typing import Any

__all__ = ["DeepseekV4Config", "DeepseekV4ForCausalLM", "make_config"]


def __getattr__(name: str) -> Any:
    """Import torch only when the model is asked for; `presets` beside this needs none."""
    if name == "DeepseekV4ForCausalLM":
        from posttrain.models.deepseek_v4.model import DeepseekV4ForCausalLM

        return DeepseekV4ForCausalLM
    if name in ("DeepseekV4Config", "make_config"):
        from posttrain.models.deepseek_v4 import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
