"""The student's supervised start on the experts' answers: what is asked of whom, what is learned, what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import pipeline
from posttrain.data import DomainData, Problem
from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.errors import BadInput, RunFailed
from posttrain.observe.metrics import read_metrics
from posttrain.observe.page.pipeline import pipeline_section
from posttrain.recipe import Recipe, load_recipe
from posttrain.recipe.graph import stage_tree
from posttrain.rundir import RunDirectory
from posttrain.stages.warm_start import answering, expert_rows
from posttrain.stages.work import Work
from rollouts.types import Completion, FinishedGroup, GroupRequest
from tests.recipe_kit import recipe_with, write_recipe

TOKENIZER = build_character_tokenizer()
EOS = int(TOKENIZER.eos_token_id)
SETTINGS: dict[str, Any] = {
    "stages.student.warm_start": {"steps": 5, "batch_size": 4, "temperature": 0.5},
    "stages.student.shares": {"sums": 3},
}


class Engines:
    """Rollout workers that say who they are: the answer is the token of the loaded checkpoint."""

    def __init__(self, tokens: dict[Path, int], cut_off: int | None = None) -> None:
        self.tokens = tokens
        self.cut_off = cut_off
        """The token of the expert whose every second answer is too long."""
        self.version = 7
        self.asked: list[GroupRequest] = []
        self.token = 0

    def weight_version(self) -> int:
        return self.version

    def load_checkpoint(self, path: Path, version: int) -> None:
        assert version > self.version
        self.version, self.token = version, self.tokens[path]

    def submit(self, groups: Sequence[GroupRequest]) -> None:
        self.submitted = list(groups)
        self.asked += groups

    def collect(self, count: int, ids: Sequence[str] | None = None) -> list[FinishedGroup]:
        assert ids == [group.id for group in self.submitted] and count == len(set(ids))
        return [FinishedGroup(group, [self.answer(group)]) for group in self.submitted]

    def answer(self, group: GroupRequest) -> Completion:
        if self.token == self.cut_off and group.index % 2:
            return Completion.of_version([self.token] * group.sampling.max_tokens, [-0.1] * 8, "length", self.version)
        return Completion.of_version([self.token, EOS], [-0.1, -0.2], "stop", self.version)

    def acknowledge(self, ids: Sequence[str]) -> None:
        self.acknowledged = ids


def problem(domain: str, number: int) -> Problem:
    return Problem(f"{domain}/{number}", domain, ({"role": "user", "content": f"{number}?"},), "2", {})


def work_of(directory: Path, engines: Engines) -> Work:
    recipe = Recipe.model_validate(recipe_with(SETTINGS))
    domains = {name: DomainData([problem(name, number) for number in range(6)], [], []) for name in recipe.domains}
    run = RunDirectory.create(directory, "run", recipe)
    cluster = SimpleNamespace(client=lambda: engines)
    return Work(recipe, run, domains, TOKENIZER, cluster)  # type: ignore[arg-type]


def rows_of(work: Work, experts: dict[str, Path]) -> list[dict[str, list[int]]]:
    student = work.recipe.stages.student
    assert student is not None and student.warm_start is not None
    return expert_rows(work, "student/sft", student, student.warm_start, experts)


def test_each_domains_prompts_are_answered_by_its_own_expert_in_its_share(tmp_path: Path) -> None:
    experts = {"sums": tmp_path / "sums", "words": tmp_path / "words"}
    engines = Engines({experts["sums"]: 5, experts["words"]: 6})
    rows = rows_of(work_of(tmp_path, engines), experts)
    said = Counter(row["input_ids"][-2] for row in rows)
    assert said == {5: 15, 6: 5}, "20 samples, three of sums for one of words"
    for row in rows:
        assert row["labels"][-2:] == row["input_ids"][-2:] and set(row["labels"][:-2]) == {-100}
    assert {request.sampling.temperature for request in engines.asked} == {0.5}
    assert len({request.id for request in engines.asked}) == 20
    places = {(request.sampling.seed, request.index) for request in engines.asked}
    assert len(places) == 20, "a prompt that comes again is answered with other random numbers"


def test_answers_come_from_the_runs_own_teacher_of_the_most_weight(tmp_path: Path) -> None:
    listed = [{"expert": "sums"}, {"expert": "words", "weight": 2}, {"checkpoint": "s3://b/large", "weight": 9}]
    recipe = Recipe.model_validate(recipe_with(SETTINGS | {"stages.student.teachers": {"words": listed}}))
    work: Any = SimpleNamespace(recipe=recipe)
    assert recipe.stages.student is not None
    experts = {"sums": Path("/s"), "words": Path("/w")}
    assert answering(work, recipe.stages.student, experts) == experts
    assert answering(work, recipe.stages.student, {"sums": Path("/s")}) == {"sums": Path("/s"), "words": Path("/s")}
    assert answering(work, recipe.stages.student, {}) == {}, "the checkpoint from elsewhere is no engine's"


def test_what_a_dropped_expert_would_have_taught_is_left_out(tmp_path: Path) -> None:
    experts = {"words": tmp_path / "words"}
    rows = rows_of(work_of(tmp_path, Engines({experts["words"]: 6})), experts)
    assert [row["input_ids"][-2] for row in rows] == [6] * 20


def test_answers_without_an_end_are_left_out_and_reported(tmp_path: Path) -> None:
    experts = {"sums": tmp_path / "sums", "words": tmp_path / "words"}
    work = work_of(tmp_path, Engines({experts["sums"]: 5, experts["words"]: 6}, cut_off=5))
    assert Counter(row["input_ids"][-2] for row in rows_of(work, experts)) == {5: 8, 6: 5}
    (event,) = [one for one in read_metrics(work.run.path / "metrics.jsonl") if one.get("event") == "warning"]
    assert event["message"] == "7 of 15 answers of sums's expert did not come to an end and were left out"


def test_a_stage_without_any_answer_fails(tmp_path: Path) -> None:
    class Endless(Engines):
        def answer(self, group: GroupRequest) -> Completion:
            return Completion.of_version([5], [-0.1], "length", self.version)

    work = work_of(tmp_path, Endless({tmp_path / "sums": 5}))
    with pytest.raises(RunFailed, match="student/sft: no answer of the experts came to an end"):
        rows_of(work, {"sums": tmp_path / "sums"})


def test_the_student_goes_on_from_its_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Path]] = []

    def stage(work: Work, name: str, config: object, start: Path, experts: object) -> Path:
        calls.append((name, start))
        return tmp_path / name

    monkeypatch.setattr(pipeline, "run_warm_start", stage)
    monkeypatch.setattr(pipeline, "run_opd", stage)
    monkeypatch.setattr(pipeline, "evaluate", lambda work, model, path: calls.append((f"evaluate {model}", path)))
    pipeline.distil(work_of(tmp_path, Engines({})), tmp_path / "base", {"sums": tmp_path / "sums"})
    assert calls == [
        ("student/sft", tmp_path / "base"),
        ("evaluate student/sft", tmp_path / "student/sft"),
        ("student", tmp_path / "student/sft"),
        ("evaluate student", tmp_path / "student"),
    ]


def test_the_stage_has_its_place_among_the_others() -> None:
    recipe = Recipe.model_validate(recipe_with(SETTINGS))
    assert recipe.stage_names()[-2:] == ["student/sft", "student"]
    assert "student/sft: 5 steps of 4 examples that the experts answered" in [
        str(node.label) for node in stage_tree(recipe).children[0].children
    ]
    assert recipe.evaluation[0].wants("student/sft")
    stages = [
        {"name": name, "status": "finished", "steps": 5, "step": 5, "seconds": 1.0} for name in recipe.stage_names()
    ]
    page = str(pipeline_section({"stages": stages, "models": []}, list(recipe.domains)))
    assert page.index("<h3>student/sft</h3>") < page.index("<h3>student</h3>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conversations": {"jsonl": "x"}}, "stages.student.warm_start.conversations: a warm start learns from the"),
        ({"temperature": 0}, "stages.student.warm_start.temperature: must be more than 0"),
        (
            {"lora": {}, "optimizer": {"name": "muon"}},
            "stages.student.warm_start.optimizer.name: the factors of `lora`",
        ),
    ],
)
def test_what_does_not_belong_there_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "small.yaml", {"stages.student.warm_start": options})
    with pytest.raises(BadInput, match=message):
        load_recipe(path)
