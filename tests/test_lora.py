"""LoRA in the stages: what learns, what the engines get, and what a checkpoint holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from posttrain.errors import BadInput
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.presets import LORA_DEFAULT, LORA_TARGETS
from posttrain.recipe import Recipe, load_recipe
from posttrain.recipe.document import dotted
from posttrain.recipe.problems import problems_of
from posttrain.recipe.stages import GrpoStage, LoraConfig, OpdStage, OptimizerConfig, SftStage
from posttrain.trainers.actor import TrainerActor
from posttrain.trainers.grpo import train_grpo
from posttrain.trainers.jobs import GrpoJob, OpdJob, SftJob
from posttrain.trainers.lora import add_adapters, has_adapters, merged_state
from posttrain.trainers.models import load_model, publishable_weights, save_checkpoint
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import train_sft
from tests.recipe_kit import recipe_with, write_recipe
from tests.test_auxiliary_training import HF, ROWS, TEXTS, state, tiny_v4
from tests.test_trainers_grpo import share_of_target
from tests.test_trainers_opd import LocalTeachers
from tests.trainers_kit import VOCABULARY, LocalClient, Recorder, prompts, tiny_model, tiny_tokenizer

FAMILIES = ["deepseek_v4", "hf"]
LORA = LoraConfig(rank=4, alpha=16)
FAST = OptimizerConfig(lr=2e-2)
TOKENS = torch.randint(2, VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(0))
BOUND = {"deepseek_v4": 0.0, "hf": 1e-5}
"""Largest difference of logits between adapters and merged weights."""


def model_of(family: str) -> PreTrainedModel:
    return tiny_v4() if family == "deepseek_v4" else tiny_model(0)


def with_adapters(model: PreTrainedModel, config: LoraConfig = LORA) -> PreTrainedModel:
    """Both factors random, so that they do something."""
    add_adapters(model, config, "base")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=draw)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


def own_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Without adapters, under the names that they had before."""
    plain = {name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in plain.items() if "lora_" not in name}


def unchanged(before: dict[str, Tensor], model: PreTrainedModel) -> bool:
    now = own_weights(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing_and_are_all_that_learns(family: str) -> None:
    model = model_of(family)
    before, expected, recorder = state(model), logits(model), Recorder()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    add_adapters(model, LORA, "base")
    assert torch.equal(logits(model), expected)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in learning)
    assert sum(parameter.numel() for parameter in learning.values()) < parameters / 4
    config = SftStage(steps=10, batch_size=4, optimizer=FAST, packing=True)
    train_sft(model, tiny_tokenizer(), ROWS, config, 0, Progress(recorder, "base", 10))
    assert recorder.lines[-1]["loss"] < recorder.lines[0]["loss"] - 0.5
    assert unchanged(before, model)


@pytest.mark.parametrize("targets", [["wq_a", "wkv"], ["wo_a"], ["experts"], ["shared_experts", "compressor"], None])
def test_every_target_of_v4_learns_and_nothing_else(targets: list[str] | None) -> None:
    model = with_adapters(tiny_v4(), LoraConfig(rank=2, alpha=4, targets=targets))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    ends = [end for target in targets or LORA_DEFAULT for end in LORA_TARGETS[target]]
    before, after = state(tiny_v4()), merged_state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(tuple(f".{end}" for end in ends))}
    assert moved and not any(".indexer." in name for name in moved)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_each_expert_has_an_adapter_of_its_own_rank() -> None:
    model = with_adapters(tiny_v4(), LoraConfig(rank=3, alpha=3))
    name = "model.layers.1.ffn.experts.w13"
    change_EOI = merged_state(model)[name] - tiny_v4().state_dict()[name]
    assert [int(torch.linalg.matrix_rank(one, rtol=1e-4)) for one in change_EOI] == [3] * 8
    flat = torch.linalg.matrix_rank(change_EOI.flatten(1), rtol=1e-4)
    assert int(flat) == 8  # all different


@pytest.mark.parametrize("precision", ["fp32", "fp4_experts"])
def test_merged_weights_are_those_of_v4s_forward_pass_to_the_last_bit(precision: str) -> None:
    model, plain = with_adapters(tiny_v4(precision=precision)), tiny_v4(precision=precision)
    before = logits(plain)
    plain.load_state_dict(merged_state(model))
    assert torch.equal(logits(plain), logits(model))
    assert (logits(model) - before).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_the_merged_model_and_beside_it_the_adapter(family: str, tmp_path: Path) -> None:
    save_checkpoint(model_of(family), tiny_tokenizer(), tmp_path / "start")
    model = with_adapters(load_model(family, tmp_path / "start"))
    expected = logits(model)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
    merged = load_model(family, tmp_path / "saved")
    assert not has_adapters(merged) and type(merged) is type(model_of(family))
    assert (logits(merged) - expected).abs().max() <= BOUND[family]
    adapted = PeftModel.from_pretrained(load_model(family, tmp_path / "start"), tmp_path / "saved" / "adapter")
    assert torch.equal(logits(adapted), expected)


def test_tied_embeddings_stay_tied_and_as_they_are(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_model(0).config)
    config.tie_word_embeddings = True
    model = Qwen3ForCausalLM(config)
    before = model.get_input_embeddings().weight.clone()
    with_adapters(model)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
    merged = load_model("hf", tmp_path / "saved")
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert (logits(merged) - logits(model)).abs().max() <= BOUND["hf"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_samples_from_the_merged_weights(family: str, beta: float) -> None:
    model = model_of(family)
    before, client, recorder = state(model), LocalClient(copy.deepcopy(model)), Recorder()
    add_adapters(model, LORA, "expert/d/grpo")
    config = GrpoStage(
        kind="grpo",
        steps=3,
        prompts_per_step=4,
        group_size=2,
        optimizer=FAST,
        beta=beta,
        reference_every=2 if beta else None,
    )
    job = GrpoJob("expert/d/grpo", config, "", "", prompts("d", TEXTS), 6, share_of_target)
    difference = train_grpo(model, tiny_tokenizer(), job, client, 1, Progress(recorder, job.stage, 3)).difference
    assert difference.tokens > 0 and difference.largest < 1e-5
    assert unchanged(before, model)
    served = client.model.state_dict()
    assert any(not torch.equal(served[name], before[name]) for name in before)
    assert publishable_weights(model).keys() == before.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_opd_trains_adapters_too(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    save_checkpoint(with_adapters(copy.deepcopy(model)), tiny_tokenizer(), tmp_path / "expert")
    before, client, recorder = state(model), LocalClient(copy.deepcopy(model)), Recorder()
    add_adapters(model, LORA, "student")
    job = OpdJob(
        *(
            "student",
            OpdStage(steps=8, batch_size=4, optimizer=OptimizerConfig(lr=5e-3)),
            "",
            "",
            {"d": prompts("d", TEXTS)},
        ),
        *({"d": str(tmp_path / "expert")}, {"d": 6}),
    )
    teachers, progress = LocalTeachers(family), Progress(recorder, "student", 8)
    difference = train_opd(model, tiny_tokenizer(), job, client, teachers, 1, progress).difference
    assert difference.tokens > 0 and difference.largest < 1e-5
    assert unchanged(before, model)
    assert recorder.lines[-1]["kl"] < recorder.lines[0]["kl"]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = with_adapters(tiny_v4())
    other = copy.deepcopy(model)
    other.train().gradient_checkpointing_enable()
    for one in (model, other):
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad is None if theirs.grad is None else torch.equal(ours.grad, theirs.grad)


def test_a_stage_starts_from_merged_weights_and_leaves_merged_weights(tmp_path: Path) -> None:
    save_checkpoint(tiny_v4(), tiny_tokenizer(), tmp_path / "start")
    trainer = TrainerActor(0, json.dumps(recipe_with({})), str(tmp_path))
    config = SftStage(steps=3, batch_size=4, optimizer=FAST, lora=LORA)
    for start, end in (("start", "base"), ("base", "expert")):
        job = SftJob(end, config, str(tmp_path / start), str(tmp_path / end), ROWS)
        assert trainer.sft(job).metrics["loss"] > 0
        adapter = tmp_path / end / "adapter"
        adapted = PeftModel.from_pretrained(load_model("deepseek_v4", tmp_path / start), adapter)
        assert torch.equal(logits(adapted), logits(load_model("deepseek_v4", tmp_path / end)))
        assert json.loads((adapter / "adapter_config.json").read_text())["r"] == LORA.rank
    assert type(load_model("deepseek_v4", tmp_path / "expert")) is DeepseekV4ForCausalLM


def test_a_target_that_the_model_does_not_have_is_named() -> None:
    message = r"stage base: lora.targets\[1\]: Qwen3ForCausalLM has no linear layer 'lm_head' below its head; there are"
    with pytest.raises(BadInput, match=message):
        add_adapters(tiny_model(0), LoraConfig(targets=["q_proj", "lm_head"]), "base")


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"stages.base.lora": {"rank": 0}}, "stages.base.lora.rank", "at least 1"),
        ({"stages.base.lora": {"targets": []}}, "stages.base.lora.targets", ""),
        (
            {"stages.student.lora": {}, "stages.student.optimizer": {"name": "muon"}},
            "stages.student.optimizer.name",
            "trained by adamw",
        ),
        (
            {"stages.base.lora": {}, "stages.base.auxiliary": {"bias_update": 1e-3}},
            "stages.base.auxiliary.bias_update",
            "with `lora` these stay as they are",
        ),
    ],
)
def test_wrong_blocks_are_named_by_their_key(changes: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(recipe_with(changes))
    problems = {dotted(problem.key): problem.message for problem in problems_of(caught.value, recipe_with(changes))}
    assert message in problems[key]


def test_targets_are_checked_where_the_family_is_known(tmp_path: Path) -> None:
    stages = [{"kind": "sft"}, {"kind": "grpo", "lora": {"targets": ["wq_a", "expert"]}}]
    changes = {"stages.experts.per_domain": stages}
    message = r"stages.experts.per_domain\[1\].lora.targets\[1\]: no target 'expert'; did you mean `experts`\?"
    with pytest.raises(BadInput, match=message):
        load_recipe(write_recipe(tmp_path / "v4.yaml", changes))
    load_recipe(write_recipe(tmp_path / "hf.yaml", HF | changes))
