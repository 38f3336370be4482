"""The model's configuration: transformers' own class, plus the fields of released checkpoints.

`DeepseekV4Config` reads a released `config.json` (compress_ratios, num_hash_layers, qk_rope_head_dim) as
well as one that transformers saved. What is added here is writing: a directory that this project
saves carries both sets of fields, so that either kind of reader finds what it looks for.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import DeepseekV4Config

from posttrain.kernels.quant.formats import FP4_GROUP
from posttrain.models.deepseek_v4.presets import HEAVY, PRESETS, SLIDING, SPARSE

RELEASED_RATES = {SLIDING: 0, SPARSE: 4, HEAVY: 128}

Precision = Literal["fp32", "bf16", "fp4_experts", "bf16_fp4_experts"]
"""`fp32`, `bf16`: what the matrices are held in. `fp4_experts`, `bf16_fp4_experts`: the same, and routed experts are
rounded to MXFP4 in every forward pass (quantisation-aware training). A config's field `precision`; without one: `fp32`.
"""


def make_config(config: str | dict[str, Any], **token_fields: Any) -> DeepseekV4Config:
    """A configuration from a preset's name or from fields.

    Args:
        config: a key of `PRESETS`, or the fields of `DeepseekV4Config`, on top of a preset if they have a
            `preset` key.
        token_fields: vocab_size, bos_token_id, eos_token_id, pad_token_id of the tokenizer in use.
    """
    fields = dict(PRESETS[config]) if isinstance(config, str) else dict(config)
    if "preset" in fields:
        fields = {**PRESETS[fields.pop("preset")], **fields}
    made = DeepseekV4Config(**{**fields, **token_fields})
    made.architectures = ["DeepseekV4ForCausalLM"]
    return made


def native_config_dict(config: DeepseekV4Config) -> dict[str, Any]:
    """`config.json` with transformers' fields and, where they can say it, the released checkpoints' fields."""
    fields = config.to_dict()
    rates = {**config.compress_rates, SLIDING: 0}
    fields["num_hash_layers"] = config.mlp_layer_types.count("hash_moe")
    fields["topk_method"] = "noaux_tc"
    fields["qk_rope_head_dim"] = rope_dim(config)
    if all(rates[kind] == RELEASED_RATES[kind] for kind in config.layer_types):
        fields["compress_ratios"] = [rates[kind] for kind in config.layer_types]
    return fields


def precision_of(config: DeepseekV4Config) -> Precision:
    """What the model's weights are held in and rounded to.

    Raises:
        ValueError: a precision that there is not, or widths that MXFP4 cannot divide into groups.
    """
    precision: Any = getattr(config, "precision", None) or "fp32"
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}")
    for name in ("hidden_size", "moe_intermediate_size"):
        if precision.endswith("fp4_experts") and getattr(config, name) % FP4_GROUP:
            raise ValueError(
                f"{name} is {getattr(config, name)}; precision {precision} needs a multiple of {FP4_GROUP}"
            )
    return precision


def fp4_experts(config: DeepseekV4Config) -> bool:
    """Whether the routed experts are rounded to MXFP4 in every forward pass."""
    return precision_of(config).endswith("fp4_experts")


def bf16_matrices(config: DeepseekV4Config) -> bool:
    """Whether matrices are held in bf16."""
    return precision_of(config).startswith("bf16")


def fp4_indexer(config: DeepseekV4Config) -> bool:
    """Whether the indexers' queries and keys are rounded to MXFP4: a config's field `indexer_precision: fp4`.

    Raises:
        ValueError: another precision, or heads that MXFP4 cannot divide into groups.
    """
    precision = getattr(config, "indexer_precision", None)
    if precision not in (None, "fp4"):
        raise ValueError(f"indexer_precision is {precision!r}; expected fp4, or none at all")
    if precision and config.index_head_dim % FP4_GROUP:
        raise ValueError(
            f"index_head_dim is {config.index_head_dim}; indexer_precision fp4 needs a multiple of {FP4_GROUP}"
        )
    return precision == "fp4"


def rope_dim(config: DeepseekV4Config) -> int:
    """Rotated channels of a head (64 of 512 in the released models)."""
    return int(config.head_dim * config.partial_rotary_factor)
