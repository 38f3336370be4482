"""The two models under test."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config
from transformers import DeepseekV4ForCausalLM as TransformersV4

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config

VOCABULARY = 128

EXPERTS = ("grouped_mm", "eager", "batched_mm")
"""transformers' implementations of the experts that run on a CPU."""

AGREEMENT = 1e-4
"""Largest difference of logits; ours and theirs are fp32 sums in different orders."""


def v4_config(**changes: Any) -> DeepseekV4Config:
    """The tiny preset."""
    return make_config("tiny", vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=1, pad_token_id=0, **changes)


def make_pair() -> tuple[DeepseekV4ForCausalLM, TransformersV4]:
    """Our tiny V4 with random weights, and transformers' with the same; checked to be the same model."""
    torch.manual_seed(0)
    ours = DeepseekV4ForCausalLM(v4_config())
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        theirs = TransformersV4.from_pretrained(Path(directory), dtype=torch.float32)
    batch = tokens(2, 16)
    with torch.no_grad():
        difference = (ours.eval()(batch).logits - theirs.eval()(batch, use_cache=False).logits).abs().max().item()
    if difference > AGREEMENT:
        raise RuntimeError(f"the two models are not the same: their logits differ by {difference:.1e}")
    return ours, theirs


def tokens(batch: int, length: int) -> Tensor:
    """Random token ids, the same in every call."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def with_experts(model: TransformersV4, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """`call` under each of transformers' implementations of the experts."""

    def under(name: str) -> Callable[[], Any]:
        def run() -> Any:
            model.set_experts_implementation(name)
            return call()

        return run

    return {name: under(name) for name in EXPERTS}
