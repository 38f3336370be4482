"""What a recipe can name of the model: configurations, targets of LoRA. No torch: recipes are checked without it."""

from __future__ import annotations

from typing import Any

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

PRESETS: dict[str, dict[str, Any]] = {
    # Every part of V4 at a size that two CPU cores train in minutes: 0.6 M parameters.
    "tiny": {
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": [SLIDING, SPARSE, HEAVY, SPARSE],
        "compress_rates": {SPARSE: 4, HEAVY: 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "sliding_window": 16,
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 4,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "num_nextn_predict_layers": 0,
    },
}

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    **{name: (f"attn.{name}.weight",) for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")},
    "compressor": ("attn.compressor.wkv.weight", "attn.compressor.wgate.weight"),
    "experts": ("ffn.experts.w13", "ffn.experts.w2"),
    "shared_experts": ("ffn.shared_experts.w13", "ffn.shared_experts.w2"),
}
"""For each target of LoRA the parameters that get adapters, as the ends of their names."""

LORA_DEFAULT = [name for name in LORA_TARGETS if name != "compressor"]
