"""The recipe's `auxiliary:` block in the trainers: what it trains, what stays frozen, and where the results go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.errors import BadInput, RunFailed
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.models.deepseek_v4.presets import SLIDING
from posttrain.recipe import Recipe
from posttrain.recipe.document import dotted
from posttrain.recipe.problems import problems_of
from posttrain.recipe.stages import GrpoStage, OpdStage, OptimizerConfig, SftStage
from posttrain.trainers import settings
from posttrain.trainers.grpo import train_grpo
from posttrain.trainers.jobs import GrpoJob, OpdJob
from posttrain.trainers.models import load_model, publishable_weights, save_checkpoint
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import train_sft
from rollouts.weights import check_coverage
from tests.recipe_kit import recipe_with
from tests.test_trainers_grpo import share_of_target
from tests.test_trainers_opd import LocalTeachers
from tests.test_trainers_sft import row
from tests.trainers_kit import EOS, PAD, VOCABULARY, LocalClient, Recorder, prompts, tiny_model, tiny_tokenizer

ROWS = [
    row("say something long enough", "aaaa bbbb"),
    row("what is 12 + 30 + 5 - 7?", "40"),
    row("once more with a few words", "d"),
    row("b", "bb"),
]
TEXTS = ["a long prompt of several words?", "hello world hello 1234", "what is 12 + 30?", "b"]
ALL = {"indexer": 1.0, "balance": 0.01, "bias_update": 0.01}
BIASES = [f"model.layers.{layer}.ffn.gate.bias" for layer in (1, 2, 3)]
METRICS = {"indexer_kl", "balance_loss", "router_violation", "router_violation/1", "router_load_max/3"}


def tiny_v4(**fields: Any) -> DeepseekV4ForCausalLM:
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    return DeepseekV4ForCausalLM(make_config({"preset": "tiny", **fields}, **tokens))


@pytest.fixture
def model() -> DeepseekV4ForCausalLM:
    return tiny_v4()


def sft(model: DeepseekV4ForCausalLM, steps: int = 4, **config: Any) -> list[dict[str, float]]:
    recorder = Recorder()
    stage = SftStage(steps=steps, batch_size=4, **({"optimizer": {"lr": 5e-3}} | config))
    train_sft(model, tiny_tokenizer(), ROWS, stage, 0, Progress(recorder, "base", steps))
    return recorder.lines


def grpo(model: DeepseekV4ForCausalLM, **config: Any) -> tuple[list[dict[str, float]], LocalClient]:
    stage = GrpoStage(
        kind="grpo", steps=3, prompts_per_step=4, group_size=2, optimizer=OptimizerConfig(lr=5e-3), **config
    )
    job = GrpoJob("expert/d/grpo", stage, "", "", prompts("d", TEXTS), 6, share_of_target)
    client, recorder = LocalClient(copy.deepcopy(model)), Recorder()
    progress = Progress(recorder, job.stage, 3, stage.updates_per_batch)
    difference = train_grpo(model, tiny_tokenizer(), job, client, 1, progress).difference
    assert difference.tokens > 0 and difference.largest < 1e-5
    return recorder.lines, client


def opd(
    model: DeepseekV4ForCausalLM, expert: DeepseekV4ForCausalLM, directory: Path, **config: Any
) -> tuple[list[dict[str, float]], LocalClient]:
    save_checkpoint(expert, tiny_tokenizer(), directory)
    job = OpdJob(
        *("student", OpdStage(steps=3, batch_size=4, **config), "", "", {"d": prompts("d", TEXTS)}),
        *({"d": str(directory)}, {"d": 6}),
    )
    client, recorder, teachers = LocalClient(copy.deepcopy(model)), Recorder(), LocalTeachers("deepseek_v4")
    progress = Progress(recorder, "student", 3)
    difference = train_opd(model, tiny_tokenizer(), job, client, teachers, 1, progress).difference
    assert difference.tokens > 0 and difference.largest < 1e-5
    return recorder.lines, client


def state(model: DeepseekV4ForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: DeepseekV4ForCausalLM) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def indexers(model: DeepseekV4ForCausalLM) -> set[str]:
    return {name for name in model.state_dict() if ".indexer." in name}


@pytest.mark.parametrize("kind", ["sft", "grpo", "opd"])
def test_by_default_indexers_and_biases_are_frozen(kind: str, model: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    before, teacher = state(model), copy.deepcopy(model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(0.5)
    lines = {
        "sft": lambda: sft(model),
        "grpo": lambda: grpo(model)[0],
        "opd": lambda: opd(model, teacher, tmp_path / "expert")[0],
    }[kind]()
    moved = changed(before, model)
    assert "lm_head.weight" in moved and "model.layers.1.ffn.gate.weight" in moved
    assert not moved & (indexers(model) | set(BIASES))
    assert model.model.auxiliary is None and not any(name.startswith("router_") for name in lines[-1])


def test_sft_trains_indexers_beside_a_model_that_feels_nothing_of_it() -> None:
    """Every entry is chosen here, so what is chosen stays the same; and every gradient is clipped: apart."""
    plain, beside = tiny_v4(index_topk=32), tiny_v4(index_topk=32)
    before = state(beside)
    optimizer = {"lr": 5e-3, "max_grad_norm": 0.05}
    without = sft(plain, steps=8, optimizer=optimizer)
    lines = sft(beside, steps=8, optimizer=optimizer, auxiliary={"indexer": 3.0})
    assert changed(state(plain), beside) == indexers(beside) == changed(before, beside) & indexers(beside)
    assert [line["grad_norm"] for line in lines] == [line["grad_norm"] for line in without]
    assert lines[-1]["indexer_kl"] < lines[0]["indexer_kl"]
    for line, other in zip(lines, without, strict=True):
        assert line["loss"] == pytest.approx(other["loss"] + 3 * 2 * line["indexer_kl"], abs=1e-5)  # two CSA layers


def test_warm_up_trains_the_indexers_and_nothing_else(model: DeepseekV4ForCausalLM) -> None:
    before = state(model)
    lines = sft(model, steps=12, auxiliary={"indexer": 1.0, "indexer_phase": "warmup"})
    assert changed(before, model) == indexers(model)
    assert lines[-1]["indexer_kl"] < lines[0]["indexer_kl"]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("updates", [1, 2], ids=["kept forward pass", "two updates"])
def test_grpo_with_everything_on_publishes_indexers_and_biases(updates: int, model: DeepseekV4ForCausalLM) -> None:
    before = state(model)
    lines, client = grpo(model, auxiliary=ALL, updates_per_batch=updates, beta=0.1)
    assert changed(before, model) >= indexers(model) | set(BIASES)
    assert set(lines[-1]) >= METRICS
    # the last publication came before the last step: the sampler has what the steps before it did
    served = client.model.state_dict()
    assert all(not torch.equal(served[name], before[name]) for name in [*indexers(model), *BIASES])
    steps = torch.cat([(served[name] - before[name]) / ALL["bias_update"] for name in BIASES])
    assert steps.abs().max() <= 2 * updates + 1e-3
    assert (steps - steps.round()).abs().max() < 1e-3


def test_opd_with_everything_on_trains_all_of_it(model: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    before, teacher = state(model), copy.deepcopy(model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(0.5)
    lines, client = opd(model, teacher, tmp_path / "expert", auxiliary=ALL)
    assert changed(before, model) >= indexers(model) | set(BIASES)
    assert set(lines[-1]) >= METRICS
    assert not torch.equal(client.model.state_dict()[BIASES[0]], before[BIASES[0]])


def test_biases_travel_with_published_weights_and_checkpoints(model: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    before = state(model)
    sft(model, auxiliary={"bias_update": 0.01})
    published = publishable_weights(model)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "saved")
    loaded = load_model("deepseek_v4", tmp_path / "saved").state_dict()
    for name in BIASES:
        now = model.state_dict()[name]
        assert not torch.equal(now, before[name])
        assert torch.equal(torch.from_numpy(published[name]), now)
        assert torch.equal(loaded[name], now)
        # what an engine checks before it loads: it takes no publication without them
        with pytest.raises(RunFailed, match=f"missing: {name}"):
            shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
            check_coverage(shapes, set(), {key: published[key].shape for key in shapes if key != name})


def test_loads_are_those_of_the_steps_tokens_without_padding(model: DeepseekV4ForCausalLM) -> None:
    (line,) = sft(model, steps=1, auxiliary={"bias_update": 1e-3})
    slots = sum(len(example["input_ids"]) for example in ROWS) * model.config.num_experts_per_tok
    violations = []
    for layer in (1, 2, 3):
        mean = slots / model.config.n_routed_experts
        assert line[f"router_load_min/{layer}"] < mean < line[f"router_load_max/{layer}"]
        assert line[f"router_violation/{layer}"] == pytest.approx(line[f"router_load_max/{layer}"] / mean)
        violations.append(line[f"router_violation/{layer}"])
    assert line["router_violation"] == max(violations)
    assert "router_violation/0" not in line  # routes by table


class Accumulated(Progress):
    """Keeps the gradients of an update, and counts updates of the biases."""

    gradients: dict[str, Tensor]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_accumulated_batches_count_as_one_step(model: DeepseekV4ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(accumulate: int, rows: list) -> tuple[Accumulated, list[dict[str, float]], dict[str, Tensor]]:
        def arguments(kind: type, **given: Any) -> Any:
            return settings.training_arguments(kind, **given, gradient_accumulation_steps=accumulate)

        monkeypatch.setattr("posttrain.trainers.sft.training_arguments", arguments)
        trained, recorder = copy.deepcopy(model), Recorder()
        progress = Accumulated(recorder, "base", 1)
        stage = SftStage(steps=1, batch_size=2, optimizer={"max_grad_norm": 1e9}, auxiliary=ALL)
        train_sft(trained, tiny_tokenizer(), rows, stage, 0, progress)
        return progress, recorder.lines, state(trained)

    once, (one,), weights = run(1, ROWS[:1] * 2)
    twice, (two,), others = run(2, ROWS[:1] * 4)  # the same batch two times
    for name, gradient in once.gradients.items():
        assert (gradient - twice.gradients[name]).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3), name
    assert two["router_load_max/1"] == 2 * one["router_load_max/1"]
    assert two["indexer_kl"] == pytest.approx(one["indexer_kl"], rel=1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert all(torch.equal(weights[name], others[name]) for name in BIASES)


@pytest.mark.parametrize(
    ("fields", "auxiliary", "message"),
    [
        ({"layer_types": [SLIDING] * 4}, {"indexer": 1.0}, "no layer of the model is of type compressed_sparse"),
        ({"mlp_layer_types": ["hash_moe"] * 4}, {"bias_update": 1e-3}, "every router of the model is a frozen hash"),
    ],
)
def test_a_model_without_the_part_is_bad_input(fields: dict, auxiliary: dict, message: str) -> None:
    with pytest.raises(BadInput, match=f"stage base: .*{message}"):
        sft(tiny_v4(**fields), auxiliary=auxiliary)
    with pytest.raises(BadInput, match="for family deepseek_v4; the model is a Qwen3ForCausalLM"):
        sft(tiny_model(0), auxiliary=auxiliary)


HF = {"model": {"family": "hf", "config": {"model_type": "qwen3"}}, "rollout": {"engine": "vllm"}}


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"stages.base.auxiliary": {"indexers": 1.0}}, "stages.base.auxiliary.indexers", ""),
        ({"stages.base.auxiliary": {"balance": -1.0}}, "stages.base.auxiliary.balance", "must be at least 0"),
        (
            {"stages.base.auxiliary": {"indexer_phase": "warmup"}},
            "stages.base.auxiliary.indexer",
            "trains the indexers only; give them a weight above 0",
        ),
        (
            {"stages.base.auxiliary": {"indexer": 1.0, "indexer_phase": "warmup", "bias_update": 1e-3}},
            "stages.base.auxiliary.bias_update",
            "the routers stay as they are",
        ),
        (
            {"stages.student.auxiliary": {"indexer": 1.0, "indexer_phase": "warmup"}},
            "stages.student.auxiliary.indexer_phase",
            "",
        ),
        (HF | {"stages.base.auxiliary": {"indexer": 1.0}}, "stages.base.auxiliary", "only `model.family: deepseek_v4`"),
        (
            HF | {"stages.experts.per_domain": [{"kind": "sft"}, {"kind": "grpo", "auxiliary": {"balance": 1e-4}}]},
            "stages.experts.per_domain[1].auxiliary",
            "only `model.family: deepseek_v4`",
        ),
    ],
)
def test_wrong_blocks_are_named_by_their_key(changes: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(recipe_with(changes))
    problems = {dotted(problem.key): problem.message for problem in problems_of(caught.value, recipe_with(changes))}
    assert message in problems[key]


def test_family_hf_with_everything_off_is_fine() -> None:
    changes = HF | {"stages.base.auxiliary": {"indexer": 0.0}}
    stages = Recipe.model_validate(recipe_with(changes)).stages
    assert stages.base is not None and not stages.base.auxiliary.any_on
    assert stages.student is not None and not stages.student.auxiliary.any_on
