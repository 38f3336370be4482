"""Packed batches: token-exact, no example sees another, and the objectives beside the loss count the same."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from posttrain.data.packing import PackedBatch, best_fit
from posttrain.errors import BadInput
from posttrain.recipe.stages import SftStage
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import mixes_sequences, train_sft
from tests.test_auxiliary_training import tiny_v4
from tests.test_trainers_sft import row
from tests.trainers_kit import EOS, LETTERS, PAD, VOCABULARY, Recorder, tiny_model, tiny_tokenizer

FAMILIES = ["deepseek_v4", "hf"]
BOUND = 1e-5
"""Largest difference of a loss, and of a gradient relative to the largest of its parameter; both fp32."""


def model_of(family: str) -> PreTrainedModel:
    return tiny_v4() if family == "deepseek_v4" else tiny_model(0)


def examples(count: int, longest: int = 40) -> list[dict[str, list[int]]]:
    """Of very different lengths."""
    draw = random.Random(0)
    words = ["".join(draw.choices(LETTERS, k=draw.randint(2, longest - 2))) for _ in range(count)]
    return [row(word, word[:4]) for word in words]


class Gradients(Progress):
    """Keeps what the first update is made of."""

    first: dict[str, Tensor] | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.first is None:
            self.first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: PreTrainedModel, rows: list[dict[str, list[int]]], **config: Any) -> tuple[list, dict[str, Tensor]]:
    stage, recorder = SftStage(**({"batch_size": 8, "max_length": 48} | config)), Recorder()
    progress = Gradients(recorder, "base", stage.steps)
    train_sft(model, tiny_tokenizer(), rows, stage, 0, progress)
    assert progress.first is not None
    return recorder.lines, progress.first


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_batch_gives_the_losses_and_gradients_of_the_padded_one(family: str) -> None:
    model, rows = model_of(family), examples(24)
    optimizer = {"lr": 1e-3, "max_grad_norm": 1e9}
    padded, expected = train(copy.deepcopy(model), rows, steps=3, optimizer=optimizer)
    packed, gradients = train(model, rows, steps=3, packing=True, optimizer=optimizer)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= BOUND * expected[name].abs().max(), name
    for one, other in zip(packed, padded, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=BOUND)
        assert one["token_accuracy"] == pytest.approx(other["token_accuracy"], abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_sees_another_example(family: str) -> None:
    """The examples of a row have, to the last bit, the hidden states that they have beside others."""
    model, rows = model_of(family).eval(), examples(6)
    changed = [rows[0], *({**one, "input_ids": [*one["input_ids"][::-1]]} for one in rows[1:])]
    batch = PackedBatch(None, PAD)

    def first_logits(given: list) -> Tensor:
        inputs = batch(given)
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        return logits[0, : len(rows[0]["input_ids"])], logits[0, -len(rows[0]["input_ids"]) :]

    assert torch.equal(first_logits(rows)[0], first_logits(changed)[0])
    last = [[*given[1:], given[0]] for given in (rows, changed)]
    assert torch.equal(first_logits(last[0])[1], first_logits(last[1])[1])


def test_balance_loads_and_biases_are_those_of_the_padded_batch() -> None:
    rows = examples(16)
    beside = {"indexer": 1.0, "balance": 0.1, "bias_update": 1e-3}
    models = tiny_v4(), tiny_v4()
    padded, _ = train(models[0], rows, steps=2, auxiliary=beside)
    packed, _ = train(models[1], rows, steps=2, auxiliary=beside, packing=True)
    assert {"balance_loss", "indexer_kl", "router_violation"} <= packed[0].keys()
    exact = [name for name in packed[0] if name.startswith("router_")]
    for one, other in zip(packed, padded, strict=True):
        assert {name: one[name] for name in exact} == {name: other[name] for name in exact}
        for name in ("balance_loss", "indexer_kl", "loss"):
            assert one[name] == pytest.approx(other[name], abs=BOUND)
    for layer, other in zip(models[1].model.layers[1:], models[0].model.layers[1:], strict=True):
        assert torch.equal(layer.ffn.gate.bias, other.ffn.gate.bias)
        assert layer.ffn.gate.bias.abs().max() > 0


def test_what_is_left_of_a_row_is_a_sequence_without_loss() -> None:
    batch = PackedBatch(8, PAD)([row("abc", "d"), row("a", ""), row("abcd", "")])
    assert batch["input_ids"].shape == (2, 7)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 0, 1]]
    assert batch["input_ids"][0, -2:].tolist() != [PAD, PAD] and batch["input_ids"][1, -2:].tolist() == [PAD, PAD]
    assert batch["labels"][1].tolist() == [-100] * 4 + [EOS, -100, -100]


def test_nothing_before_an_example_predicts_its_first_token() -> None:
    whole = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert PackedBatch(None, PAD)([whole, whole])["labels"].tolist() == [[-100, 6, 7, -100, 6, 7]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60))
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths: list[int], capacity: int) -> None:
    rows = best_fit(lengths, capacity)
    assert sorted(index for one in rows for index in one) == [*range(len(lengths))]
    assert all(sum(lengths[index] for index in one) <= capacity for one in rows)
    loads = sorted(sum(lengths[index] for index in one) for one in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity  # else the two would share a row


def test_a_model_that_mixes_the_sequences_of_a_row_is_refused() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=PAD, eos_token_id=EOS
    )
    model = MambaForCausalLM(config)
    assert mixes_sequences(model) and not mixes_sequences(tiny_model(0))
    with pytest.raises(BadInput, match=r"stage base: packing: MambaForCausalLM does not keep the sequences"):
        train(model, examples(8), steps=1, packing=True)
