"""V4's reasoning efforts: how problems are asked in them, shown, judged, sampled, measured and reported."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.data import DomainData, Problem
from posttrain.data.efforts import in_effort, in_every_effort, in_shares, split_completion, with_reasoning
from posttrain.data.encoding import encode_text, render_prompt
from posttrain.data.problems import make_problem
from posttrain.data.rows import check_problems, sft_rows
from posttrain.data.sources import read_jsonl
from posttrain.data.steps import column_sums, written_sums
from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.data.v4.templates import MAX_PREFIX
from posttrain.errors import BadInput
from posttrain.observe.intervals import accuracy_interval, binomial_interval
from posttrain.observe.report import build_report, write_report
from posttrain.observe.status import final_table
from posttrain.recipe import Recipe, load_recipe
from posttrain.recipe.domains import ModeConfig
from posttrain.recipe.evaluation import HoldoutEvaluation
from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import GrpoStage, OpdStage
from posttrain.stages.evaluate import measure_problems
from posttrain.stages.grpo import draw, prompts_of
from posttrain.stages.scoring import DomainRewards, check_rewards
from posttrain.stages.sft import draw_examples
from posttrain.trainers.grpo import GrpoTrainer, train_grpo
from posttrain.trainers.jobs import GrpoJob, OpdJob, Prompt
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from rollouts.types import Completion, Sampling
from tests.observe_kit import finished_run, write_run
from tests.observe_kit import recipe as observed_recipe
from tests.recipe_kit import recipe_with, write_recipe
from tests.test_pipeline_parts import work_of
from tests.test_trainers_opd import LocalTeachers
from tests.trainers_kit import LocalClient, Recorder, save, tiny_model, tiny_tokenizer, tokens

TOKENIZER = build_character_tokenizer()
MODES: dict[str, Any] = {
    "chat": {"max_new_tokens": 6},
    "high": {"max_new_tokens": 24, "length_penalty": {"length": {"target": 10, "limit": 20, "weight": 0.5}}},
    "max": {
        "max_new_tokens": 60,
        "prefix": "Think.\n",
        "length_penalty": {"effort_length": {"k0": 1.0, "tau": 50, "norm": 40, "cap": 0.3, "effort": 51}},
    },
}
PLAIN = {effort: ModeConfig() for effort in ("chat", "high", "max")}


def question(text: str = "1 + 2=", answer: str = "3", **entry: Any) -> Problem:
    return make_problem("sums", [{"role": "user", "content": text}], answer, entry, None)


def recipe_in_modes(**changes: Any) -> Recipe:
    return Recipe.model_validate(recipe_with({"domains.sums.modes": MODES, **changes}))


def rewards_of(recipe: Recipe, directory: Path, problems: Sequence[Problem]) -> DomainRewards:
    TOKENIZER.save_pretrained(directory / "tokenizer")
    return DomainRewards(recipe, str(directory / "tokenizer"), problems)


def completion(text: str) -> list[int]:
    """Its tokens: `</think>` and the end are single ones."""
    reasoning, mark, answer = text.rpartition("</think>")
    ids = encode_text(TOKENIZER, reasoning) + [TOKENIZER.convert_tokens_to_ids("</think>")] * bool(mark)
    return ids + encode_text(TOKENIZER, answer) + [TOKENIZER.eos_token_id]


# Asking


def test_each_mode_asks_in_v4s_layout_and_under_an_id_of_its_own():
    problem = question()
    start, end = "<｜begin▁of▁sentence｜>", "<｜User｜>1 + 2=<｜Assistant｜>"
    asked = [in_effort(problem, effort, config) for effort, config in PLAIN.items()]
    texts = [render_prompt(one.messages, one.mode) for one in asked]
    assert texts == [f"{start}{end}</think>", f"{start}{end}<think>", f"{start}{MAX_PREFIX}{end}<think>"]
    assert [one.id for one in asked] == [f"{problem.id}@chat", f"{problem.id}@high", f"{problem.id}@max"]


def test_a_prefix_of_the_recipe_stands_where_v4s_does():
    problem = make_problem("sums", [{"role": "user", "content": "a"}], "b", {}, "Be brief.")
    asked = in_effort(problem, "max", ModeConfig(prefix="Think.\n"))
    text = render_prompt(asked.messages, asked.mode)
    assert text == "<｜begin▁of▁sentence｜>Think.\nBe brief.<｜User｜>a<｜Assistant｜><think>"
    assert text == render_prompt(problem.messages, "thinking_max").replace(MAX_PREFIX, "Think.\n")


def test_every_beginning_of_a_list_has_the_modes_in_their_shares():
    modes = {"chat": ModeConfig(share=3), "high": ModeConfig(), "max": ModeConfig(share=2)}
    efforts = [problem.effort for problem in in_shares([question()] * 600, modes)]
    for length in range(1, 601):
        for effort, share in (("chat", 3), ("high", 1), ("max", 2)):
            assert abs(efforts[:length].count(effort) - length * share / 6) <= 1


def test_without_modes_problems_stay_what_they_are():
    problems = [question("1"), question("2")]
    assert in_shares(problems, {}) == in_every_effort(problems, {}) == problems
    assert [one.effort for one in in_every_effort(problems, PLAIN)] == ["chat"] * 2 + ["high"] * 2 + ["max"] * 2


# Showing


def test_sft_learns_reasoning_mark_answer_and_end():
    config = recipe_in_modes().domains["sums"]
    problem = in_effort(question(reasoning="1,2"), "max", config.modes["max"])
    (row,) = sft_rows(TOKENIZER, with_reasoning([problem], config))
    learned = [label for label in row["labels"] if label != -100]
    assert TOKENIZER.decode(learned) == "1,2</think>3<｜end▁of▁sentence｜>"
    assert TOKENIZER.decode(row["input_ids"]).startswith("<｜begin▁of▁sentence｜>Think.\n<｜User｜>1 + 2=")
    (plain,) = with_reasoning([in_effort(question(), "chat", config.modes["chat"])], config)
    assert plain.reasoning == ""


def test_a_file_brings_its_reasoning_row_by_row(tmp_path: Path):
    rows = [{"prompt": f"{number}+0=", "answer": str(number), "reasoning": f"{number}"} for number in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe_in_modes().domains["sums"]
    asked = [in_effort(problem, "high", config.modes["high"]) for problem in read_jsonl("sums", str(path), None)]
    assert [problem.reasoning for problem in with_reasoning(asked, config)] == ["0", "1", "2"]


def no_text(problem: Problem) -> Any:
    return 3


def fails(problem: Problem) -> str:
    return problem.entry["steps"]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (None, "domains.sums.modes.high.reasoning: SFT needs the reasoning that leads to each answer, and sums/"),
        ("tests.test_efforts:no_text", "gives int for sums/"),
        ("tests.test_efforts:fails", "KeyError: 'steps'"),
        ("tests.test_efforts:missing", "cannot be imported: AttributeError"),
    ],
)
def test_missing_or_failing_reasoning_is_bad_input(function: str | None, complaint: str):
    recipe = recipe_in_modes(**{"domains.sums.modes": {"high": {"reasoning": function}}})
    problems = [question()]
    domains = {"sums": DomainData(problems, problems, problems)}
    with pytest.raises(BadInput) as found:
        check_problems(recipe, TOKENIZER, domains)
    assert complaint in str(found.value)
    only_grpo = {"stages.base": None, "stages.experts.per_domain": [{"kind": "grpo"}]}
    check_problems(
        Recipe.model_validate(recipe_with({"domains.sums.modes": {"high": {}}, **only_grpo})), TOKENIZER, domains
    )


@pytest.mark.parametrize(
    ("reasoning", "changes", "complaint"),
    [
        ("1" * 30, {}, "domains.sums.modes.high.max_new_tokens is 24; the longest reference answer has 33 tokens"),
        ("1,2", {"rollout.max_model_len": 75, "stages.base.max_length": 80}, "domains.sums.modes.max needs 77"),
        ("1" * 20, {"stages.base.max_length": 34}, "stages.base: max_length is 34; the longest example of "
         "domains.sums.modes.max has 40"),
        ("é", {}, "with the answer '3', the reasoning 'é'"),
    ],
)  # fmt: skip
def test_each_mode_has_to_fit(reasoning: str, changes: dict[str, Any], complaint: str):
    problems = [question(reasoning=reasoning)]
    with pytest.raises(BadInput) as found:
        check_problems(recipe_in_modes(**changes), TOKENIZER, {"sums": DomainData(problems, problems, problems)})
    assert complaint in str(found.value)


def test_sums_are_written_column_by_column():
    problem = question(metadata={"expression": "769 + 43"})
    assert column_sums(problem) == "12,11,8"
    assert written_sums(problem) == "9+3+0=12,6+4+1=11,7+0+1=8"


# Judging


def test_the_answer_is_what_follows_the_reasoning():
    ids = completion("1,2</think>3")
    assert [len(part) for part in split_completion(TOKENIZER, ids, "thinking")] == [4, 2]
    assert split_completion(TOKENIZER, ids, "chat") == ([], ids)
    assert split_completion(TOKENIZER, ids[:3], "thinking_max") == (ids[:3], [])


@pytest.mark.parametrize(
    ("effort", "text", "correct"),
    [
        ("chat", "3", True),
        ("chat", "1,2</think>3", False),
        ("high", "1,2</think>3", True),
        ("high", "</think>3", True),
        ("high", "3", False),  # thought, and never said
        ("high", "3</think>4", False),
        ("max", "1,2</think>3", True),
    ],
)
def test_only_the_answer_is_judged(tmp_path: Path, effort: Any, text: str, correct: bool):
    recipe = recipe_in_modes()
    problem = in_effort(question(), effort, recipe.domains["sums"].modes[effort])
    shown, result = rewards_of(recipe, tmp_path, [problem]).judge(problem.id, completion(text), "stop")
    assert (shown, result.correct) == (text, correct)


def test_length_penalties_are_parts_of_their_mode_alone(tmp_path: Path):
    recipe = recipe_in_modes()
    problems = in_every_effort([question()], recipe.domains["sums"].modes)
    rewards = rewards_of(recipe, tmp_path, problems)
    text = "1" * 12 + "</think>3"  # 15 tokens, 13 of them reasoning
    totals, parts = rewards([one.id for one in problems], [completion("3"), *[completion(text)] * 2], ["stop"] * 3)
    linear = -(15 - 10) / (20 - 10)
    by_effort = -math.exp(-(51 - 1) / 50) * 13 / 40
    assert parts == [
        {"exact": 1.0},
        {"exact": 1.0, "length": linear},
        {"exact": 1.0, "effort_length": pytest.approx(by_effort)},
    ]
    assert totals == pytest.approx([1.0, 1.0 + 0.5 * linear, 1.0 + by_effort])
    _, (long,) = rewards([problems[2].id], [completion("1" * 50 + "</think>3")], ["stop"])
    assert long["effort_length"] == -0.3  # the cap: exp(-1) * 51 / 40 would be 0.47


def test_rewards_are_tried_in_every_mode():
    recipe = recipe_in_modes(**{"domains.sums.reward": ["tests.test_efforts:only_aloud"]})
    problems = [question()]
    with pytest.raises(BadInput, match=r"only_aloud gives the reference answer '3' of sums/.*@high 0.0"):
        check_rewards(recipe, {"sums": DomainData(problems, problems, problems), "words": DomainData([], [], [])})


def only_aloud(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    return float(problem.effort == "chat" and text == problem.answer)


# The recipe


@pytest.mark.parametrize(
    ("modes", "key", "complaint"),
    [
        ({"low": {}}, "domains.sums.modes.low", "chat, high, max"),
        ({"high": {"max_new_tokens": 256}}, "domains.sums.modes.high.max_new_tokens", "no room for a prompt"),
        ({"high": {"length_penalty": {"length": {"target": 9, "limit": 3}}}}, "high.length_penalty", "target < limit"),
        ({"high": {"length_penalty": {"exact": {}}}}, "high.length_penalty", "length, effort_length"),
        ({"max": {"reasoning": "posttrain.data.steps:nothing"}}, "domains.sums.modes.max.reasoning", "cannot be"),
        ({"max": {"share": 0}}, "domains.sums.modes.max.share", "more than 0"),
    ],
)
def test_a_wrong_mode_is_refused_by_its_key(tmp_path: Path, modes: dict[str, Any], key: str, complaint: str):
    path = write_recipe(tmp_path / "recipe.yaml", {"domains.sums.modes": modes})
    with pytest.raises(BadInput) as found:
        load_recipe(path)
    assert key in str(found.value) and complaint in str(found.value)


# Sampling and learning


class Advantages(list[torch.Tensor]):
    """Takes the advantages of every batch."""

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Advantages:
        original = GrpoTrainer.batch_scored

        def batch_scored(trainer: GrpoTrainer, batch: dict[str, Any]) -> None:
            self.append(batch["advantages"].clone())
            original(trainer, batch)

        monkeypatch.setattr(GrpoTrainer, "batch_scored", batch_scored)
        return self


def test_advantages_are_centred_within_prompt_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question in two modes, of which one always gets 10 more: the other's answers are none the worse."""
    seen = Advantages().watch(monkeypatch)
    ids = tokens("what?")
    prompts = [Prompt("d/0@chat", "d", ids, "chat", 3), Prompt("d/0@high", "d", ids, "high", 9)]
    rewards: dict[str, list[float]] = {"d/0@chat": [0, 1, 0, 1], "d/0@high": [10, 10, 10, 14]}

    def reward(problem_ids: Sequence[str], *_: Any) -> tuple[list[float], list[dict[str, float]]]:
        given = [rewards[problem][index % 4] for index, problem in enumerate(problem_ids)]
        return given, [{}] * len(given)

    stage = GrpoStage(kind="grpo", steps=1, prompts_per_step=2, group_size=4, scale_rewards="none")
    job = GrpoJob("expert/d/grpo", stage, "", "", prompts, 9, reward, RolloutConfig())
    model, recorder = tiny_model(0), Recorder()
    client = LocalClient(copy.deepcopy(model))
    train_grpo(model, tiny_tokenizer(), job, client, 5, Progress(recorder, "expert/d/grpo", 1))
    assert seen[0].tolist() == [-0.5, 0.5, -0.5, 0.5, -1, -1, -1, 3]
    assert [request.sampling.max_tokens for request in client.asked] == [3, 9]
    (line,) = recorder.lines
    assert (line["effort/chat/reward"], line["effort/high/reward"]) == (0.5, 11.0)
    assert 1 <= line["effort/chat/length"] <= 3 and 1 <= line["effort/high/length"] <= 9
    assert line["completion_length"] == pytest.approx((line["effort/chat/length"] + line["effort/high/length"]) / 2)


def test_a_student_is_asked_in_modes_with_their_budgets(tmp_path: Path) -> None:
    teacher, student = save(tiny_model(1), tmp_path / "teacher"), tiny_model(0)
    ids = tokens("what?")
    prompts = [Prompt("d/0@chat", "d", ids, "chat", 2), Prompt("d/0@max", "d", ids, "max", 7)]

    def reward(problem_ids: Sequence[str], *_: Any) -> tuple[list[float], list[dict[str, float]]]:
        return [float(problem.endswith("max")) for problem in problem_ids], [{}] * len(problem_ids)

    stage = OpdStage(steps=1, batch_size=4)
    job = OpdJob("student", stage, "", "", {"d": prompts}, {"d": teacher}, {"d": 7}, reward)
    client, recorder = LocalClient(copy.deepcopy(student)), Recorder()
    train_opd(student, tiny_tokenizer(), job, client, LocalTeachers(), 3, Progress(recorder, "student", 1))
    assert sorted(request.sampling.max_tokens for request in client.asked) == [2, 2, 7, 7]
    (line,) = recorder.lines
    assert (line["effort/chat/reward"], line["effort/max/reward"], line["reward"]) == (0.0, 1.0, 0.5)
    assert line["effort/chat/length"] <= 2 < line["effort/max/length"]


def test_stages_draw_problems_in_the_shares_of_their_modes(tmp_path: Path) -> None:
    modes = {"chat": {"share": 2, "max_new_tokens": 5}, "high": {"share": 1, "max_new_tokens": 9}}
    work, run = work_of(tmp_path, {"domains.sums.modes": modes})
    problems = [question(f"{number} + 0=", str(number), reasoning="0") for number in range(6)]
    work.domains["sums"] = DomainData(problems, problems, problems)
    drawn = draw(work, "expert/sums/grpo", "sums", 6)
    assert sorted(one.effort for one in drawn) == ["chat"] * 4 + ["high"] * 2  # type: ignore[type-var]
    assert {one.id.partition("@")[0] for one in drawn} == {problem.id for problem in problems}
    again = [one.id for one in draw(work, "expert/sums/grpo", "sums", 24)]
    assert len(again) == 12 and len(set(again)) > 6, "in two rounds, and not always in the same mode"
    prompts = prompts_of(work, drawn)
    assert {(prompt.effort, prompt.max_new_tokens) for prompt in prompts} == {("chat", 5), ("high", 9)}
    for prompt, problem in zip(prompts, drawn, strict=True):
        assert TOKENIZER.decode(prompt.token_ids) == render_prompt(problem.messages, problem.mode)
    shown = draw_examples(work, "base", ["sums", "words"], 24)
    assert [one.effort for one in shown if one.domain == "sums"].count("high") == 4
    assert {one.reasoning for one in shown if one.effort == "high"} == {"0"}
    run.close()


# Measuring and reporting


class Answers:
    """A client that gives what it is told, mode by mode."""

    def __init__(self, answers: Sequence[Sequence[str]]) -> None:
        self.answers = iter(answers)
        self.asked: list[tuple[int, list[str]]] = []

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        self.asked.append((sampling.max_tokens, [TOKENIZER.decode(prompt) for prompt in prompts]))
        given = [completion(text) for text in next(self.answers)]
        return [[Completion.of_version(ids, [0.0] * len(ids), "stop", 1)] for ids in given]


def test_accuracy_and_length_are_measured_in_each_mode(tmp_path: Path):
    recipe = recipe_in_modes()
    config = recipe.domains["sums"]
    problems = in_every_effort([question("1 + 2=", "3"), question("2 + 2=", "4")], config.modes)
    client = Answers([["3", "5"], ["1</think>3", "2,2</think>4"], ["1,2</think>4", "</think>5"]])
    rewards = rewards_of(recipe, tmp_path, problems)
    found = measure_problems(recipe, client, TOKENIZER, problems, rewards, HoldoutEvaluation(n=2))  # type: ignore[arg-type]
    assert [limit for limit, _ in client.asked] == [6, 24, 60]
    assert [prompts[0][-12:] for _, prompts in client.asked][1:] == ["ant｜><think>"] * 2
    by_mode = found.by_mode()
    assert [by_mode[effort]["pass@1"] for effort in ("chat", "high", "max")] == [0.5, 1.0, 0.0]
    assert [by_mode[effort]["mean_length"] for effort in ("chat", "high", "max")] == [2.0, 5.0, 4.5]
    assert by_mode["high"]["ci95"] == list(binomial_interval(2, 2))
    assert found.shares == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert found.accuracy == pytest.approx(0.5) and found.interval == accuracy_interval(found.shares, 3)
    assert len(found.transcripts) == 6


def test_a_report_says_accuracy_and_length_of_each_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records = finished_run()
    parts = {"pass@1": 0.625, "ci95": [0.55, 0.7], "n": 256, "truncated": 0.0}
    modes = {"chat": {**parts, "mean_length": 3.25}, "max": {**parts, "pass@1": 0.875, "mean_length": 41.5}}
    for record in records:
        if record.get("event") == "evaluated" and record["domain"] == "letters" and record["model"] == "student":
            record["modes"] = {**modes, "broken": {"pass@1": "x"}}
        if record.get("stage") == "expert/letters/grpo" and "metrics" in record:
            record["metrics"] |= {"effort/max/length": 40.0, "effort/chat/length": 3.0}
    run = write_run(tmp_path / "run", records, observed_recipe())
    report = build_report(run)
    (student,) = [model for model in report["models"] if model["name"] == "student"]
    assert student["eval"]["letters"]["modes"] == {effort: {**parts, **modes[effort]} for effort in ("chat", "max")}
    assert "modes" not in student["eval"]["arithmetic"]
    from rich.console import Console

    Console(width=120).print(final_table(report))
    table = capsys.readouterr().out
    assert "by reasoning effort" in table and "62.5 % (55.0–70.0)" in table and "41.5" in table
    page = write_report(run).read_text()
    assert "Reasoning efforts on letters" in page and "41.5 tokens" in page
    assert "Reasoning efforts on arithmetic" not in page
    assert "Completion length by effort" in page and "letters: max" in page and "letters: high" not in page
    assert json.loads((run / "report.json").read_text())["schema"] == report["schema"]
