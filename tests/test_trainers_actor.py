"""The trainer as a Ray actor: stages one after the other, their checkpoints, metrics and results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from distill.pool import TeacherPool, start_teachers
from posttrain.errors import BadInput
from posttrain.observe.metrics import read_metrics
from posttrain.recipe.stages import GrpoStage, OpdStage, OptimizerConfig, SftStage
from posttrain.trainers.actor import TrainerActor
from posttrain.trainers.jobs import GrpoJob, OpdJob, SftJob, StageResult
from posttrain.trainers.models import load_model, load_tokenizer, publishable_weights, save_checkpoint
from tests.ray_kit import cluster_for_actors
from tests.trainers_kit import EOS, LocalClient, prompts, save, tiny_model, tokens

RECIPE = {
    "name": "tiny",
    "seed": 3,
    "model": {"family": "hf", "checkpoint": "unused"},
    "rollout": {"engine": "vllm"},
    "domains": {"letters": {"source": {"jsonl": "unused.jsonl"}}},
    "stages": {"experts": {"per_domain": [{"kind": "sft"}]}},
}
ROWS = [
    {"input_ids": [*tokens(f"say {letter}" + letter), EOS], "labels": [-100] * 5 + [tokens(letter)[0], EOS]}
    for letter in "abcdefgh"
]
PROMPTS = prompts("letters", [f"say {letter}" for letter in "abcdefgh"])
FAST = OptimizerConfig(lr=5e-3)


def ends(problem_ids, completion_ids, finish_reasons):  # type: ignore[no-untyped-def]
    return [float(reason == "stop") for reason in finish_reasons], [{} for _ in finish_reasons]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, object]]:
    with cluster_for_actors(0.5) as options:
        yield options


@pytest.fixture(scope="module")
def teachers(cluster: dict[str, object]) -> TeacherPool:
    return start_teachers(1, "hf", budget_bytes=1 << 30, actor_options=cluster)


def sft_job(start: str, output: Path, stage: str = "base") -> SftJob:
    config = SftStage(steps=20, batch_size=4, optimizer=FAST)
    return SftJob(stage, config, start, str(output), ROWS)


def test_one_actor_runs_every_kind_of_stage(cluster: dict[str, object], teachers: TeacherPool, tmp_path: Path) -> None:
    start = save(tiny_model(0), tmp_path / "start")
    trainer = ray.remote(TrainerActor).options(**cluster).remote(0, json.dumps(RECIPE), str(tmp_path))
    client = LocalClient(tiny_model(0))

    base: StageResult = ray.get(trainer.sft.remote(sft_job(start, tmp_path / "base")))
    grpo_config = GrpoStage(kind="grpo", steps=4, prompts_per_step=2, group_size=4, optimizer=FAST)
    grpo_job = GrpoJob("expert/letters/grpo", grpo_config, base.checkpoint, str(tmp_path / "expert"), PROMPTS, 4, ends)
    expert: StageResult = ray.get(trainer.grpo.remote(grpo_job, client))
    opd_config = OpdStage(steps=5, batch_size=4, optimizer=FAST)
    opd_job = OpdJob(
        *("student", opd_config, start, str(tmp_path / "student"), {"letters": PROMPTS}),
        *({"letters": expert.checkpoint}, {"letters": 4}),
    )
    student: StageResult = ray.get(trainer.opd.remote(opd_job, client, teachers))

    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = {name: [r["step"] for r in records if r["stage"] == name] for name in {r["stage"] for r in records}}
    assert steps == {
        "base": list(range(1, 21)),
        "expert/letters/grpo": list(range(1, 5)),
        "student": list(range(1, 6)),
    }
    for result, stage in ((base, "base"), (expert, "expert/letters/grpo"), (student, "student")):
        assert result.metrics == [r["metrics"] for r in records if r["stage"] == stage][-1]
        assert result.seconds > 0 and result.tokens > 0
        assert load_tokenizer(result.checkpoint).eos_token_id == EOS
        changed = [
            not torch.equal(new, old)
            for new, old in zip(
                load_model("hf", result.checkpoint).parameters(), tiny_model(0).parameters(), strict=True
            )
        ]
        assert all(changed)
    assert base.max_abs_logprob_diff is None and base.weight_sync_seconds == []
    for result, count in ((expert, 4), (student, 5)):
        assert result.max_abs_logprob_diff < 1e-4
        assert result.k3 < 1e-8
        assert len(result.weight_sync_seconds) == count
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_a_wrong_teacher_is_bad_input(teachers: TeacherPool, tmp_path: Path) -> None:
    start = save(tiny_model(0), tmp_path / "start")
    wider = save(tiny_model(0, vocabulary=50), tmp_path / "wider")
    job = OpdJob(
        *("student", OpdStage(steps=1, batch_size=4), start, str(tmp_path / "student"), {"letters": PROMPTS}),
        *({"letters": wider}, {"letters": 4}),
    )
    trainer = TrainerActor(0, json.dumps(RECIPE), str(tmp_path))
    with pytest.raises(BadInput, match=r"wider has a vocabulary of 50 tokens, the student one of 43"):
        trainer.opd(job, LocalClient(tiny_model(0)), teachers)
    assert not (tmp_path / "student").exists()


def test_a_stage_is_repeatable_and_depends_on_its_name(tmp_path: Path) -> None:
    start = save(tiny_model(0), tmp_path / "start")
    trainer = TrainerActor(0, json.dumps(RECIPE), str(tmp_path))

    def weights(stage: str) -> torch.Tensor:
        result = trainer.sft(sft_job(start, tmp_path / "out", stage))
        return torch.cat([parameter.flatten() for parameter in load_model("hf", result.checkpoint).parameters()])

    first = weights("base")
    assert torch.equal(first, weights("base"))
    assert not torch.equal(first, weights("expert/letters/sft"))


def test_published_weights_are_the_models_under_their_names() -> None:
    model = tiny_model(0)
    weights = publishable_weights(model)
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(torch.from_numpy(weights[name]), value) for name, value in model.state_dict().items())


def test_a_model_may_name_its_weights_for_the_engine() -> None:
    model = tiny_model(0)
    model.engine_state_dict = lambda state: {"embed": model.model.embed_tokens.weight}
    assert list(publishable_weights(model)) == ["embed"]


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    save(tiny_model(0), path)
    (path / "stale.txt").write_text("left over")
    save_checkpoint(tiny_model(1), load_tokenizer(path), path)
    assert not (path / "stale.txt").exists()
    assert torch.equal(load_model("hf", path).lm_head.weight, tiny_model(1).lm_head.weight)
