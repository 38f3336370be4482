"""Forward and backward of a training batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.measure import compare
from benchmarks.models import tokens, with_experts
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM


def training(ours: DeepseekV4ForCausalLM, theirs: nn.Module, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Tokens per second through loss and all gradients; no optimizer."""
    rows = tokens(batch, length)

    def step(model: nn.Module, **arguments: Any) -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        model(rows, labels=rows, **arguments).loss.backward()

    result = compare(
        lambda: step(ours),
        with_experts(theirs, lambda: step(theirs, use_cache=False)),
        repeats,
        batch * length,
    )
    for model in (ours, theirs):
        model.eval().zero_grad(set_to_none=True)
    return {"batch": batch, "length": length, "repeats": repeats, "tokens_per_second": result}
