"""Training on long sequences: a layer computed for some of its tokens at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, chunks
from tests.v4_models import VOCABULARY, our_model

LENGTHS = [40, 3, 21]


def packed() -> dict[str, Tensor]:
    """Three sequences in a row."""
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return {"input_ids": torch.randint(0, VOCABULARY, (1, sum(LENGTHS))), "position_ids": positions.unsqueeze(0)}


def outcome(model: DeepseekV4ForCausalLM, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss."""
    model.zero_grad()
    result = model(**inputs, labels=inputs["input_ids"])
    result.loss.backward()
    return result.logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 7, 16, 63])
def test_chunks_of_tokens_give_the_logits_and_gradients_of_the_whole(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = our_model(5).train(), packed()
    logits, gradients = outcome(model, inputs)
    model.gradient_checkpointing_enable()
    monkeypatch.setattr(chunks, "TOKENS", size)
    monkeypatch.setattr(chunks.in_chunks, "__defaults__", (size,))
    called: list[int] = []
    after = type(model.model.layers[0]).after
    monkeypatch.setattr(
        type(model.model.layers[0]),
        "after",
        lambda self, streams, *others: called.append(len(streams)) or after(self, streams, *others),
    )
    chunked_logits, chunked = outcome(model, inputs)
    assert max(called) == size
    assert torch.equal(logits, chunked_logits)
    assert chunked.keys() == gradients.keys()
    # Not each to its own size: those of mHC's scales are what is left of sums that cancel.
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (chunked[name] - gradient).abs().max() <= 1e-6 * largest, name


def test_short_sequences_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = our_model(5).train()
    model.gradient_checkpointing_enable()
    monkeypatch.setattr(chunks, "in_chunks", None)
    outcome(model, packed())
