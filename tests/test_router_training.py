"""Routers frozen, and routed ahead: which experts a step uses, and which parameters move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.routing import UNKNOWN, chosen_experts
from posttrain.recipe import Recipe
from posttrain.recipe.document import dotted
from posttrain.recipe.problems import problems_of
from posttrain.recipe.stages import SftStage
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import SftTrainer, train_sft
from tests.recipe_kit import recipe_with
from tests.test_auxiliary_training import HF, changed, grpo, opd, sft, state, tiny_v4
from tests.test_sft_packing import examples
from tests.trainers_kit import Recorder, tiny_model, tiny_tokenizer

GATES = {f"model.layers.{layer}.ffn.gate.weight" for layer in range(4)}


@pytest.mark.parametrize("kind", ["sft", "grpo", "opd"])
def test_a_frozen_router_stays_and_all_else_learns(kind: str, tmp_path: Any) -> None:
    free, frozen, teacher = tiny_v4(), tiny_v4(), tiny_v4()
    before = state(free)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(0.5)
    for model, options in ((free, {}), (frozen, {"freeze_router": True})):
        if kind == "opd":
            opd(model, teacher, tmp_path / f"expert-{len(options)}", **options)
        else:
            (sft if kind == "sft" else grpo)(model, **options)
    assert changed(before, free) - changed(before, frozen) == GATES
    assert changed(before, frozen) < changed(before, free)
    assert all(parameter.requires_grad for parameter in frozen.parameters())


def experts_of(model: DeepseekV4ForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    """What `model` chooses for each row by itself: `[B, S, layers, k]`, `UNKNOWN` on padding."""
    ids_BS = inputs["input_ids"]
    routes = torch.full((*ids_BS.shape, 4, 2), UNKNOWN)
    for row, mask_S in enumerate(inputs["attention_mask"].bool()):
        with torch.no_grad(), chosen_experts(model.model) as chosen:
            model(input_ids=ids_BS[row][mask_S][None])
        routes[row, mask_S] = torch.stack(chosen, dim=1)
    return routes


def watch(
    monkeypatch: pytest.MonkeyPatch, model: DeepseekV4ForCausalLM, steps: int, **config: Any
) -> tuple[list[DeepseekV4ForCausalLM], list[dict[str, Tensor]], list[float]]:
    """Train; of each step the model before it, its inputs, and its loss."""
    models, batches, original = [], [], SftTrainer.compute_loss

    def compute_loss(self: SftTrainer, model: Any, inputs: dict[str, Tensor], *rest: Any, **more: Any) -> Tensor:
        copied = tiny_v4()  # the trainer's has forward passes patched in
        copied.load_state_dict(model.state_dict())
        models.append(copied)
        batches.append(copy.deepcopy(inputs))
        return original(self, model, inputs, *rest, **more)

    monkeypatch.setattr(SftTrainer, "compute_loss", compute_loss)
    stage, recorder = SftStage(steps=steps, batch_size=4, max_length=48, optimizer={"lr": 2e-2}, **config), Recorder()
    train_sft(model, tiny_tokenizer(), examples(4 * steps), stage, 0, Progress(recorder, "base", steps))
    return models, batches, [line["loss"] for line in recorder.lines]


@pytest.mark.parametrize("steps_before", [1, 3])
def test_a_batch_goes_to_the_experts_of_the_model_of_so_many_updates_before(
    steps_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, batches, losses = watch(monkeypatch, tiny_v4(), 6, anticipatory_routing=steps_before)
    assert len(models) == 6
    other_than_now = 0
    for step, (model, batch) in enumerate(zip(models, batches, strict=True)):
        earlier = models[max(0, step - steps_before)]
        assert torch.equal(batch["routes"], experts_of(earlier, batch))
        other_than_now += int((batch["routes"] != experts_of(model, batch)).sum())
        # features and the experts' weights are the current model's
        with torch.no_grad():
            expected = model(**batch).loss.item()
        assert losses[step] == pytest.approx(expected, abs=1e-5)
    assert other_than_now > 0


def test_routing_ahead_sees_the_same_batches_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, _ = watch(monkeypatch, tiny_v4(), 4)
    monkeypatch.undo()
    _, ahead, _ = watch(monkeypatch, tiny_v4(), 4, anticipatory_routing=9)
    assert all("routes" not in batch for batch in plain)
    for one, other in zip(ahead, plain, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_routing_ahead_packed_is_routing_ahead_padded() -> None:
    rows, losses = examples(16), []
    for packing in (False, True):
        recorder, model = Recorder(), tiny_v4()
        config = SftStage(steps=4, batch_size=4, max_length=48, packing=packing, anticipatory_routing=2)
        train_sft(model, tiny_tokenizer(), rows, config, 0, Progress(recorder, "base", 4))
        losses.append([line["loss"] for line in recorder.lines])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_loads_are_those_of_the_experts_that_were_used() -> None:
    """With biases that move by the loads of routing ahead."""
    auxiliary = {"bias_update": 1e-3, "balance": 1e-4}
    now, ahead = tiny_v4(), tiny_v4()
    first = [sft(now, steps=1, auxiliary=auxiliary), sft(ahead, steps=1, auxiliary=auxiliary, anticipatory_routing=2)]
    names = [name for name in first[0][0] if name.startswith("router_")]
    assert names and all(
        first[0][0][name] == first[1][0][name] for name in names
    )  # the first batch has no earlier model


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (HF | {"stages.student.freeze_router": True}, "stages.student.freeze_router", "only `model.family: deepseek"),
        (HF | {"stages.base.anticipatory_routing": 2}, "stages.base.anticipatory_routing", "leave it out"),
        (
            {"stages.base.freeze_router": True, "stages.base.auxiliary": {"balance": 1e-4}},
            "stages.base.auxiliary.balance",
            "trains routers that `freeze_router` freezes",
        ),
        ({"stages.student.anticipatory_routing": 2}, "stages.student.anticipatory_routing", ""),
    ],
)
def test_wrong_options_are_named_by_their_key(changes: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(recipe_with(changes))
    problems = {dotted(problem.key): problem.message for problem in problems_of(caught.value, recipe_with(changes))}
    assert message in problems[key]


def test_another_familys_model_has_no_router_to_freeze() -> None:
    model = tiny_model(0)
    config = SftStage(steps=1, batch_size=2, freeze_router=True)
    train_sft(model, tiny_tokenizer(), examples(4), config, 0, Progress(None, "base", 1))
    assert all(parameter.requires_grad for parameter in model.parameters())
