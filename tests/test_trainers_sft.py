"""Supervised fine-tuning: which tokens the loss sees, and that it falls."""

from __future__ import annotations

import pytest
import torch

from posttrain.errors import BadInput, RunFailed
from posttrain.recipe.stages import OptimizerConfig, SftStage
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import fitting, train_sft
from tests.trainers_kit import EOS, Recorder, tiny_model, tiny_tokenizer, tokens


def row(prompt: str, answer: str) -> dict[str, list[int]]:
    answer_ids = [*tokens(answer), EOS]
    return {
        "input_ids": [*tokens(prompt), *answer_ids],
        "labels": [-100] * len(prompt) + answer_ids,
    }


def train(model: torch.nn.Module, rows: list[dict[str, list[int]]], seed: int = 0, **config: object) -> Recorder:
    recorder = Recorder()
    stage = SftStage(**config)
    train_sft(model, tiny_tokenizer(), rows, stage, seed, Progress(recorder, "base", stage.steps))
    return recorder


def test_the_loss_is_the_mean_cross_entropy_over_the_answers_tokens() -> None:
    rows = [row("abc", "de"), row("what is 1+1?", "2"), row("x", "yzyzyz"), row("lmnop", "q")]
    model = tiny_model(0)
    losses = []
    for example in rows:
        input_ids = torch.tensor([example["input_ids"]])
        logps = torch.log_softmax(model(input_ids=input_ids).logits[0, :-1], dim=-1)
        targets = input_ids[0, 1:]
        chosen = torch.tensor(example["labels"][1:]) != -100
        losses.append(-logps[torch.arange(len(targets)), targets][chosen])
    expected = torch.cat(losses).mean().item()
    (line,) = train(model, rows, steps=1, batch_size=4).lines
    assert line["loss"] == pytest.approx(expected, abs=1e-5)
    assert (line["step"], line["steps"]) == (1, 1)


def test_training_teaches_the_answer_and_when_to_stop() -> None:
    rows = [row(f"say {letter}", letter * 3) for letter in "abcdefgh"]
    model = tiny_model(0)
    lines = train(model, rows, steps=60, batch_size=8, optimizer=OptimizerConfig(lr=5e-3)).lines
    assert lines[-1]["loss"] < 0.05 < lines[0]["loss"]
    assert lines[-1]["token_accuracy"] == 1
    assert all(line["tokens_per_second"] > 0 for line in lines)


def test_the_same_seed_gives_the_same_weights() -> None:
    rows = [row(f"say {letter}", letter * 3) for letter in "abcdefghijkl"]

    def weights(seed: int) -> torch.Tensor:
        model = tiny_model(0)
        train(model, rows, seed=seed, steps=5, batch_size=4)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = weights(7)
    assert torch.equal(first, weights(7))
    assert not torch.equal(first, weights(8))


def test_rows_that_are_too_long_are_left_out() -> None:
    dataset = fitting([row("short", "a"), row("long" * 10, "b")], max_length=10)
    assert len(dataset) == 1
    assert dataset[0]["labels"][-2:] == [*tokens("a"), EOS]


def test_only_rows_that_are_too_long_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"none of the 1 training rows.*max_length=8"):
        fitting([row("long" * 10, "b")], max_length=8)


def test_a_loss_that_is_not_a_number_stops_the_stage() -> None:
    model = tiny_model(0)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(RunFailed, match="stage base, step 1: the loss is nan"):
        train(model, [row("a", "b")] * 4, steps=2, batch_size=4)
