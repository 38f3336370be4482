"""What a run's stages were begun with, and what becomes of them when that is no longer there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.data import DomainData, Problem
from posttrain.errors import BadInput
from posttrain.observe.metrics import read_metrics
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory, read_state
from posttrain.stages import origin
from posttrain.stages.origin import code_hash, inputs_of, reconcile
from tests.recipe_kit import recipe_with

SUMS = ["expert/sums/sft", "expert/sums/grpo"]
WORDS = ["expert/words/sft", "expert/words/grpo"]
SFT, GRPO = {"kind": "sft", "steps": 10}, {"kind": "grpo", "steps": 5}
ALL = ["base", *SUMS, *WORDS, "student"]


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(recipe_with({key.replace("__", "."): value for key, value in changes.items()}))


def data(answer: str = "2") -> dict[str, DomainData]:
    problems = {
        name: Problem(f"{name}/1", name, ({"role": "user", "content": "1+1"},), "2", {}) for name in ("sums", "words")
    }
    problems["words"] = replace(problems["words"], answer=answer)
    return {name: DomainData([problem], [], []) for name, problem in problems.items()}


def different(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in one if one[name] != other.get(name)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"evaluation": [], "name": "other", "cluster.trainers": 2, "snapshots": {"every": 5}}, []),
        ({"watchdog": {"action": "stop"}}, []),
        ({"stages.student.steps": 7}, ["student"]),
        ({"stages.experts.gate.min_gain": 0.5}, ["student"]),
        ({"stages.experts.per_domain": [SFT, {"kind": "grpo", "steps": 3}]}, [SUMS[1], WORDS[1], "student"]),
        ({"stages.experts.overrides": {"words": [{"kind": "sft", "steps": 3}, GRPO]}}, [*WORDS, "student"]),
        ({"domains.words.max_new_tokens": 5}, ["base", *SUMS, *WORDS, "student"]),
        ({"stages.base.steps": 3}, ALL),
        ({"seed": 9}, ALL),
        ({"cluster.threads": 2}, ALL),
    ],
)
def test_a_change_is_one_of_the_stages_that_it_concerns_and_of_those_behind(
    changes: dict[str, Any], expected: list[str]
) -> None:
    before, after = inputs_of(recipe(), data()), inputs_of(Recipe.model_validate(recipe_with(changes)), data())
    assert different(before, after) == expected


def test_a_change_of_a_domains_data_is_not_one_of_the_other_experts() -> None:
    without = {"stages.base": None}
    before = inputs_of(Recipe.model_validate(recipe_with(without)), data())
    after = inputs_of(Recipe.model_validate(recipe_with(without)), data("3"))
    assert different(before, after) == [*WORDS, "student"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Base and the sums' expert are done, the words' is being trained, all of them from `recipe()` and `data()`."""
    made = RunDirectory.create(tmp_path, "run", recipe())
    now = inputs_of(recipe(), data())
    for name in ("base", *SUMS, WORDS[0]):
        made.note_origin(name, now[name], code_hash())
        made.start_stage(name)
        made.snapshots_path(name).mkdir(parents=True)
        if name != WORDS[0]:
            made.checkpoint_path(name).mkdir(parents=True)
            made.finish_stage(name, made.checkpoint_path(name), 1.0, {})
    made.checkpoint_path("student-start").mkdir()
    made.close()
    return RunDirectory.open(tmp_path / "run")


def statuses(run: RunDirectory) -> list[str]:
    return [run.stage(name).status for name in ALL]


UNCHANGED = ["done", "done", "done", "pending", "pending", "pending"]


def test_what_is_the_same_is_gone_on_with(run: RunDirectory) -> None:
    reconcile(recipe(evaluation=[]), run, data(), "refuse")
    assert statuses(run) == UNCHANGED and run.stage(WORDS[0]).attempts == 1
    assert run.snapshots_path(WORDS[0]).is_dir()
    assert run.recipe.evaluation == []
    run.close()
    with RunDirectory.open(run.path) as again:
        assert again.recipe.evaluation == []


def test_changes_are_refused_by_name_and_change_nothing(run: RunDirectory) -> None:
    before = (run.path / "state.json").read_text(), (run.path / "recipe.yaml").read_text()
    with pytest.raises(BadInput) as caught:
        reconcile(recipe(stages__base__steps=3), run, data(), "refuse")
    text = str(caught.value)
    for name in ("base (done)", "expert/sums/sft (done)", "expert/sums/grpo (done)", "expert/words/sft (pending)"):
        assert f"  {name}: its part of the recipe, its data, or a stage that it starts from is another" in text
    assert "student" not in text and "--changed rerun" in text and "--changed keep" in text
    assert before == ((run.path / "state.json").read_text(), (run.path / "recipe.yaml").read_text())
    assert run.checkpoint_path("base").is_dir()


def test_what_changed_is_done_anew_with_all_that_depends_on_it(run: RunDirectory) -> None:
    sums = [{"kind": "sft", "steps": 10}, {"kind": "grpo", "steps": 3}]
    changed = recipe(stages__experts__overrides={"words": [{"kind": "sft", "steps": 3}], "sums": sums})
    reconcile(changed, run, data(), "rerun")
    assert run.stage("base").status == "done" and run.checkpoint_path("base").is_dir()
    assert run.stage("expert/sums/grpo").status == "pending" and run.stage("expert/sums/grpo").attempts == 0
    assert not run.checkpoint_path("expert/sums/grpo").exists()
    assert run.stage("expert/sums/sft").status == "done"
    assert run.stage(WORDS[0]).attempts == 0 and not run.snapshots_path(WORDS[0]).exists()
    assert list(read_state(run.path).stages) == changed.stage_names()
    reset = [one["stage"] for one in read_metrics(run.path / "metrics.jsonl") if one["event"] == "stage_reset"]
    assert reset == ["expert/sums/grpo", "expert/words/sft"]
    reconcile(changed, run, data(), "refuse")


def test_after_an_upgrade_finished_stages_stay_only_if_somebody_says_so(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "code_hash", lambda: "newer")
    with pytest.raises(BadInput, match=r"base \(done\): posttrain's code, or a library that computes, is another"):
        reconcile(recipe(), run, data(), "refuse")
    reconcile(recipe(), run, data(), "keep")
    assert statuses(run) == UNCHANGED
    assert run.stage("base").code == "newer" and run.stage(WORDS[0]).attempts == 0
    assert not run.snapshots_path(WORDS[0]).exists(), "an interrupted stage begins again"
    reconcile(recipe(), run, data(), "refuse")


def test_a_run_of_a_version_that_noted_nothing_is_not_guessed_at(run: RunDirectory) -> None:
    change: Callable[..., None] = run._change
    change("base", inputs=None, code=None)
    with pytest.raises(BadInput, match=r"base \(done\): a version of posttrain began it that did not note what with"):
        reconcile(recipe(), run, data(), "refuse")


@pytest.mark.parametrize("changes", [{"seed": 5}, {"model.precision": "bf16", "rollout.dtype": "bfloat16"}])
def test_another_model_needs_another_run(changes: dict[str, Any], run: RunDirectory) -> None:
    with pytest.raises(BadInput, match="was begun with another model or seed, which a run keeps; start a new run"):
        reconcile(Recipe.model_validate(recipe_with(changes)), run, data(), "rerun")


def test_the_merged_start_of_a_student_goes_with_it(run: RunDirectory) -> None:
    now = inputs_of(recipe(), data())
    run.note_origin("student", now["student"], code_hash())
    run.start_stage("student")
    reconcile(recipe(stages__student__steps=7), run, data(), "rerun")
    assert not run.checkpoint_path("student-start").exists()
