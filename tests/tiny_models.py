"""Tiny random checkpoints for tests: real configurations, real tokenizer, no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

WEIGHT_SPREAD = 0.08
"""Standard deviation of the matrices: wide enough that the next token is far from uniform and depends on the text."""


def tiny_qwen3(seed: int, *, tied: bool = False, layers: int = 2) -> Qwen3ForCausalLM:
    """A random Qwen3 of 0.3 M parameters in fp32 for the project's character tokenizer (128 tokens)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from posttrain.data.tokenizer import build_character_tokenizer

    tokenizer = build_character_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, WEIGHT_SPREAD, generator=generator)
            else:  # norms: not all one, so that a norm that was not loaded shows
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def save_tiny_qwen3(directory: Path, seed: int, *, tied: bool = False) -> Qwen3ForCausalLM:
    """Write such a model with its tokenizer as a checkpoint directory, and return it."""
    from posttrain.data.tokenizer import build_character_tokenizer

    model = tiny_qwen3(seed, tied=tied)
    model.save_pretrained(directory)
    build_character_tokenizer().save_pretrained(directory)
    return model
