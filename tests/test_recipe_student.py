"""The student's part of a recipe: who teaches, from what it starts, what belongs together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import BadInput
from posttrain.recipe import Recipe, load_recipe
from posttrain.recipe.graph import stage_tree
from posttrain.recipe.student import GuardsConfig, TeacherConfig
from tests.recipe_kit import REMOVED, recipe_with, write_recipe


def with_student(changes: dict[str, Any]) -> Recipe:
    return Recipe(**recipe_with({f"stages.student.{key}": value for key, value in changes.items()}))


def student(changes: dict[str, Any]) -> Any:
    return with_student(changes).stages.student


@pytest.mark.parametrize("written", [{}, {"teachers": "experts"}, {"teachers": {}}])
def test_every_domain_has_its_own_expert_unless_the_recipe_says_otherwise(written: dict[str, Any]) -> None:
    assert with_student(written).teachers_of("sums") == [TeacherConfig(expert="sums")]
    assert student(written).guards == GuardsConfig()


def test_teachers_may_be_other_experts_and_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text("{}")
    listed = [{"expert": "words", "weight": 2}, {"checkpoint": "big"}, {"checkpoint": "s3://bucket/teachers/large/"}]
    recipe = load_recipe(write_recipe(tmp_path / "small.yaml", {"stages.student.teachers": {"sums": listed}}))
    teachers = recipe.teachers_of("sums")
    assert [teacher.name for teacher in teachers] == ["words", "big", "large"]
    assert teachers[1].checkpoint == str(tmp_path / "big")
    assert teachers[2].checkpoint == "s3://bucket/teachers/large/"
    assert recipe.teachers_of("words") == [TeacherConfig(expert="words")]
    names = [str(node.label) for node in stage_tree(recipe).children[0].children[-1].children]
    assert names[0] == "teacher: expert/words/grpo for sums"
    assert names[1] == f"teacher: {tmp_path / 'big'} for sums"
    assert names[3] == "teacher: expert/words/grpo"


def test_a_domain_without_stages_has_no_expert_and_other_teachers(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text("{}")
    big = [{"checkpoint": "big"}]
    written = {"stages.experts.overrides": {"sums": []}, "stages.student.teachers": {"sums": big}}
    recipe = load_recipe(write_recipe(tmp_path / "some.yaml", written))
    assert recipe.experts == ["words"]
    assert recipe.stage_names() == ["base", "expert/words/sft", "expert/words/grpo", "student"]
    written = {"stages.experts": REMOVED, "stages.student.teachers": {"sums": big, "words": big}}
    recipe = load_recipe(write_recipe(tmp_path / "none.yaml", written))
    assert recipe.experts == []
    assert recipe.stage_names() == ["base", "student"]
    assert [str(node.label) for node in stage_tree(recipe).children[0].children] == [
        "student: reverse_kl, 10 steps of 64 samples of its own"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teachers": {"sums": [{"expert": "words"}]}},
            r"stages.experts.per_domain: has no stage, so words has no expert",
        ),
        (
            {"teachers": {"sums": [{"checkpoint": "x"}], "words": [{"expert": "sums"}]}},
            r"teachers.words\[0\].expert: sums has no expert: stages.experts gives it no stages",
        ),
        (
            {"teachers": {name: [{"checkpoint": "x"}] for name in ("sums", "words")}, "warm_start": {"steps": 2}},
            r"stages.student.warm_start: learns from experts of this run, and sums has none",
        ),
        (
            {"teachers": {name: [{"checkpoint": "x"}] for name in ("sums", "words")}, "init": "average"},
            r"stages.student.init: must be base: there are no experts to merge",
        ),
    ],
)
def test_what_needs_an_expert_is_refused_where_there_is_none(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    written = {f"stages.student.{key}": value for key, value in changes.items()}
    with pytest.raises(BadInput, match=message):
        load_recipe(write_recipe(tmp_path / "small.yaml", {**written, "stages.experts": REMOVED}))


def test_the_tree_says_when_teachers_teach() -> None:
    listed = [{"expert": "sums", "last_step": 4}, {"expert": "words", "first_step": 3}]
    recipe = Recipe(**recipe_with({"stages.student.teachers": {"sums": listed}}))
    names = [str(node.label) for node in stage_tree(recipe).children[0].children[-1].children]
    assert names[0] == "teacher: expert/sums/grpo, steps 1 to 4"
    assert names[1] == "teacher: expert/words/grpo for sums, from step 3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": "x"}, r"stages.student.teachers: expected `experts`, or a mapping"),
        ({"teachers": {"other": [{"expert": "sums"}]}}, r"stages.student.teachers.other: no such domain"),
        ({"teachers": {"sums": [{"expert": "x"}]}}, r"stages.student.teachers.sums\[0\].expert: no such domain"),
        ({"teachers": {"sums": []}}, r"stages.student.teachers.sums: .*at least 1"),
        ({"teachers": {"sums": [{"weight": 1}]}}, r"stages.student.teachers.sums\[0\]: give exactly one of `expert`"),
        ({"teachers": {"sums": [{"checkpoint": "nowhere"}]}}, r"teachers.sums\[0\].checkpoint: there is no directory"),
        ({"init": "average", "init_scale": 0.5}, r"stages.student.init_scale: is for `init: task_arithmetic`"),
        ({"jsd_beta": 0.5}, r"stages.student.jsd_beta: is for `divergence: jsd`"),
        ({"divergence": "sampled_token", "top_k": 8}, r"stages.student.top_k: sampled_token looks at the sampled"),
        (
            {"teachers": {"sums": [{"expert": "sums", "first_step": 5, "last_step": 4}]}},
            r"teachers.sums\[0\].last_step: must not be before first_step, which is 5",
        ),
        (
            {"teachers": {"sums": [{"expert": "sums", "last_step": 4}, {"expert": "words", "first_step": 6}]}},
            r"stages.student.teachers.sums: nobody teaches in step 5 of 10",
        ),
        ({"guards": {"patience": 4}}, r"stages.student.guards: there is nothing to guard"),
        ({"guards": {"length_ratio": 1}}, r"stages.student.guards.length_ratio: must be more than 1"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "small.yaml", {f"stages.student.{key}": value for key, value in changes.items()})
    with pytest.raises(BadInput, match=message):
        load_recipe(path)
