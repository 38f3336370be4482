"""The comparison of students: the arms take equal samples, results are kept apart by settings, tables say what is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import distillation_arms
from benchmarks.distillation import SIZES, begun
from benchmarks.distillation_arms import ARMS, STAGE, Comparison
from benchmarks.distillation_page import curve, kept, plot, show
from posttrain.data import DomainData, Problem
from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.errors import BadInput
from posttrain.recipe import load_recipe
from posttrain.recipe.stages import OpdStage
from posttrain.trainers.jobs import GrpoJob, SftJob
from tests.recipe_kit import ROOT

RECIPE = load_recipe(ROOT / "recipes" / "tiny_v4.yaml", list(SIZES))
EXPERTS = {name: Path(name) for name in RECIPE.domains}


class Noting(Comparison):
    """Trains nothing, and keeps what would be trained."""

    def distil(self, config: OpdStage, start: Path, output: Path) -> Path:
        assert start == self.base
        self.config = config
        return output


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Noting:
    jobs: list[Any] = []

    def note(job: Any, *_: Any) -> Any:
        return jobs.append(job)

    trainer = SimpleNamespace(sft=SimpleNamespace(remote=note), grpo=SimpleNamespace(remote=note))
    message = {"role": "user", "content": "1+1="}
    data = {
        name: DomainData([Problem(f"{name}/{i}", name, (message,), "2", {}) for i in range(9)], [], [])
        for name in RECIPE.domains
    }
    run = SimpleNamespace(
        path=tmp_path, log_path=tmp_path / "log", tokenizer_path=tmp_path, checkpoint_path=lambda name: tmp_path / name
    )
    cluster = SimpleNamespace(trainers=[trainer], client=lambda: None)
    tokenizer = build_character_tokenizer()
    work: Any = SimpleNamespace(
        recipe=RECIPE, run=run, domains=data, tokenizer=tokenizer, cluster=cluster, measured={}, jobs=jobs
    )
    monkeypatch.setattr(distillation_arms, "wait", lambda *_: None)
    return Noting(work, tmp_path / "base", EXPERTS)


DISTILLED = {
    "reverse_kl": {},
    "sampled_token": {"divergence": "sampled_token"},
    "top_8": {"top_k": 8},
    "top_32": {"top_k": 32},
    "forward_kl": {"divergence": "forward_kl"},
    "fixed_negative": {"divergence": "fixed_negative"},
}


@pytest.mark.parametrize("arm", DISTILLED)
def test_distilled_arms_differ_from_the_recipes_student_in_what_they_are_named_after(
    arm: str, comparison: Noting
) -> None:
    ARMS[arm](comparison, arm)
    assert comparison.config == comparison.student.model_copy(update=DISTILLED[arm])
    assert comparison.notes == {"samples": comparison.samples}


def test_the_slow_arm_differs_in_its_rates_alone(comparison: Noting) -> None:
    ARMS["sampled_token_slow"](comparison, "slow")
    found, whole = comparison.config.optimizer, comparison.student.optimizer
    assert (found.lr, found.adamw_lr) == (whole.lr / 4, (whole.adamw_lr or 0) / 4)
    assert found.model_copy(update={"lr": whole.lr, "adamw_lr": whole.adamw_lr}) == whole


def test_one_actor_learns_all_domains_in_their_shares_from_as_many_samples(comparison: Noting) -> None:
    ARMS["mixed_grpo"](comparison, "mixed_grpo")
    (job,) = comparison.work.jobs  # type: ignore[attr-defined]
    assert isinstance(job, GrpoJob)
    config = job.config
    assert config.steps * config.prompts_per_step * config.group_size == comparison.samples
    assert comparison.notes["samples"] == comparison.samples and job.checkpoint == str(comparison.base)
    assert len(job.prompts) == config.steps * config.prompts_per_step
    first = Counter(prompt.domain for prompt in job.prompts[: config.prompts_per_step])
    assert first["arithmetic"] in (51, 52) and first.total() == 64, "four of arithmetic for one of counting"


def test_sft_learns_from_as_many_answers_with_the_students_optimizer(
    comparison: Noting, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    rows = [{"input_ids": [1], "labels": [1]}] * 7
    monkeypatch.setattr(distillation_arms, "expert_rows", lambda *arguments: asked.append(arguments) or rows)
    ARMS["expert_outputs"](comparison, "expert_outputs")
    (job,) = comparison.work.jobs  # type: ignore[attr-defined]
    assert isinstance(job, SftJob) and job.rows == rows
    assert job.config.steps * job.config.batch_size == comparison.samples
    assert job.config.optimizer == comparison.student.optimizer
    assert asked[0][1:] == (STAGE, comparison.student, job.config, EXPERTS)
    assert comparison.notes == {"samples": comparison.samples, "learned": 7}


def test_an_arm_that_is_run_again_is_measured_again(comparison: Noting) -> None:
    old, other = comparison.work.run.checkpoint_path("arm/x"), "elsewhere"
    old.mkdir(parents=True)
    comparison.work.measured |= {(str(old), "a", "holdout", ""): 0.5, (other, "a", "holdout", ""): 0.25}
    assert comparison.output("x") == old and not old.exists()
    assert comparison.work.measured == {(other, "a", "holdout", ""): 0.25}


def test_results_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "distillation.json"
    results = begun(file, RECIPE)
    assert results == json.loads(file.read_text()) and results["runs"] == []
    assert begun(file, RECIPE.model_copy(update={"seed": 5})) == results, "one file for all seeds"
    elsewhere = load_recipe(ROOT / "recipes" / "tiny_v4.yaml", [*SIZES, "cluster.rollout_workers=1"])
    assert begun(file, elsewhere) == results, "more workers are only faster"
    other = load_recipe(ROOT / "recipes" / "tiny_v4.yaml")
    with pytest.raises(BadInput, match=r"distillation.json has results of other settings; give another --output"):
        begun(file, other)


def cell(share: float) -> dict[str, Any]:
    return {"pass@1": share, "ci95": [share - 0.1, share + 0.1], "n": 64, "mean_length": 3.0}


def run(arm: str, seed: int, *shares: float, metric: str = "reverse_kl") -> dict[str, Any]:
    steps = [
        {"step": step, "steps": 2, "seconds": 10.0 * step, metric: 1.0 / step, "reward": 0.25 * step} for step in (1, 2)
    ]
    accuracy = dict(zip(("a", "b"), map(cell, shares), strict=True))
    return {
        "arm": arm, "seed": seed, "samples": 320, "seconds": 21.0, "accuracy": accuracy, "steps": steps,
        "reverse_kl": {"a": 0.5, "b": 0.25}, "top1_agreement": {"a": 1.0, "b": 1.0},
    }  # fmt: skip


def reference(a: float, b: float) -> dict[str, Any]:
    shares = {"base": (0.1, 0.1), "a": (a, 0.0), "b": (0.0, b)}
    accuracy = {name: dict(zip(("a", "b"), map(cell, pair), strict=True)) for name, pair in shares.items()}
    return {"accuracy": accuracy, "reverse_kl": {"a": 2.0, "b": 4.0}}


RESULTS = {
    "references": {"0": reference(0.8, 0.5), "1": reference(0.8, 0.0)},
    "runs": [run("reverse_kl", 0, 0.6, 0.5, metric="kl"), run("top_8", 0, 0.4, 0.4), run("top_8", 1, 0.2, 0.2)],
}


def test_the_table_has_means_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    show(RESULTS)
    lines = capsys.readouterr().out.splitlines()
    (base,) = [line for line in lines if line.startswith("| base")]
    assert "| 3.000 [3.000–3.000] |" in base
    assert "| reverse_kl | 1 | 60.0 | 50.0 | 55.0 | 75 % | 0.375 | 3.00 | 320 | 21 |" in lines
    (top,) = [line for line in lines if line.startswith("| top_8")]
    assert "| 30.0 [20.0–40.0] | 30.0 [20.0–40.0] | 30.0 [20.0–40.0] |" in top


def test_what_is_kept_is_the_worst_of_the_domains() -> None:
    first, second, third = RESULTS["runs"]
    assert (kept(RESULTS, first), kept(RESULTS, second)) == (pytest.approx(0.75), pytest.approx(0.5))
    assert kept(RESULTS, third) == pytest.approx(0.25), "there is nothing to keep of an expert at 0"


def test_curves_go_over_samples_and_seconds(tmp_path: Path) -> None:
    plain, other, _ = RESULTS["runs"]
    assert (
        curve(plain, "samples", "reverse_kl") == curve(other, "samples", "reverse_kl") == [(160.0, 1.0), (320.0, 0.75)]
    )
    assert curve(other, "seconds", "reward") == [(10.0, 0.25), (20.0, 0.375)]
    assert curve(other, "samples", "completion_length") == []
    plot(RESULTS, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000
