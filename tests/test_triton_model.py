"""The whole model on Triton kernels: against transformers, against plain torch, and against itself in other company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.kernels import backend
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.checkpoint import FLOAT32
from posttrain.models.deepseek_v4.context import PackedContext
from posttrain.models.deepseek_v4.presets import HEAVY, SPARSE
from tests.triton_kit import DEVICE, running
from tests.v4_models import VOCABULARY, our_model, saved_twin, transformers_model

NATIVE = DEVICE.type == "cuda"
LENGTHS = (1, 23, 0, 40, 9) if NATIVE else (1, 9, 0, 13)
SMALL: dict[str, Any] = (
    {} if NATIVE else {"num_hidden_layers": 2, "layer_types": [SPARSE, HEAVY], "mlp_layer_types": ["hash_moe", "moe"]}
)
"""The interpreter takes seconds for a layer: two of them, of both kinds, and few tokens."""


@pytest.fixture(autouse=True)
def lowest_index_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves the order of ties to `torch.topk`."""

    def topk(values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> object:
        ordered = torch.sort(values, dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((ordered.values.narrow(dim, 0, k), ordered.indices.narrow(dim, 0, k)))

    monkeypatch.setattr(torch, "topk", topk)
    monkeypatch.setattr(torch.Tensor, "topk", topk)


def packed(model: DeepseekV4ForCausalLM, sequences: list[Tensor]) -> list[Tensor]:
    """Hidden states of sequences that are packed in this order."""
    lengths = torch.tensor([0, *(len(one) for one in sequences)])
    hidden_TD = model.model.forward_packed(torch.cat(sequences), PackedContext(lengths.cumsum(0).to(DEVICE)))
    return list(hidden_TD.split([len(one) for one in sequences]))


def in_bf16(model: DeepseekV4ForCausalLM) -> DeepseekV4ForCausalLM:
    """Matrices in bf16, what the released checkpoints keep in fp32 in fp32."""
    for name, parameter in model.named_parameters():
        if not FLOAT32.search(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(DEVICE)


def sequences(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).to(DEVICE) for length in LENGTHS]


def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = transformers_model(0, **SMALL)
    ours = saved_twin(theirs, tmp_path).to(DEVICE)
    tokens = torch.randint(0, VOCABULARY, (2, 41) if NATIVE else (2, 11), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens, use_cache=False).logits
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(slopes)
    with running("triton"):
        logits = ours(tokens.to(DEVICE)).logits
        logits.backward(slopes.to(DEVICE))
    assert (logits.cpu() - expected).abs().max() <= 1e-5
    twin = DeepseekV4ForCausalLM(ours.config)  # gradients take the way of the weights, from their layout to ours
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    twin = saved_twin(theirs, tmp_path / "gradients")
    largest = max(float(wanted.abs().max()) for wanted in twin.parameters())
    for name, wanted in twin.named_parameters():
        got = dict(ours.named_parameters())[name].grad
        assert got is not None or not wanted.any(), name
        if got is not None:
            assert (got.cpu() - wanted).abs().max() <= 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if NATIVE else [torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone_and_packed_in_any_order(dtype: torch.dtype) -> None:
    model = our_model(1, **SMALL).requires_grad_(False)
    model = in_bf16(model) if dtype is torch.bfloat16 else model.to(DEVICE)
    given = sequences(3)
    with running("triton"):
        together = packed(model, given)
        turned = packed(model, given[::-1])[::-1]
        for number, one in enumerate(given):
            assert torch.equal(together[number], turned[number])
            assert not len(one) or torch.equal(together[number], packed(model, [one])[0])


@pytest.mark.skipif(not NATIVE, reason="needs a GPU: the interpreter takes minutes")
def test_two_steps_give_the_same_bits_and_bf16_is_near_fp32() -> None:
    given = sequences(5)

    def gradients(which: backend.Backend, model: DeepseekV4ForCausalLM) -> list[Tensor]:
        with running(which):
            torch.cat(packed(model, given)).float().square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    first, second = (gradients("triton", in_bf16(our_model(2))) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    exact = gradients("oracle", our_model(2).to(DEVICE))
    ours = torch.cat([one.flatten().float() for one in first])
    wanted = torch.cat([one.flatten() for one in exact])
    assert torch.nn.functional.cosine_similarity(ours, wanted, 0) > 0.9
