"""A run in which the model judges its own answers and learns to judge, killed in the middle, on real engines."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from posttrain.data import Problem
from rollouts.log import recover
from tests.pipeline_kit import Command, contents, records, steps_of
from tests.test_async_resume import RECIPE as RESUMED
from tests.test_async_resume import losses, tokens_sampled, until_nothing_runs

STAGE = "expert/sums/grpo"
STEPS = 5
SUMS = RESUMED["domains"]["sums"]
RECIPE: dict[str, Any] = {
    **RESUMED,
    "name": "judged",
    "domains": {
        "sums": {
            **SUMS,
            "reward": [
                {"exact": {"weight": 0}},
                {"rubric": {"judge": {"actor": "verdicts", "votes": 3},
                            "criteria": [{"criterion": "it is right", "points": 1}]}},
            ],
            "holdout": 4, "max_new_tokens": 12,
        },
        "verdicts": {
            "source": {"judging": {"domain": "sums", "prompt": "{question}{answer}?"}},
            "reward": ["tests.test_judge_run:parity"],
            "train": 40, "selection": 2, "holdout": 8, "max_new_tokens": 6,
        },
    },
    "stages": {
        "experts": {"per_domain": [{"kind": "grpo", "steps": STEPS, "prompts_per_step": 4, "group_size": 4}],
                    "joint": {"sums": ["verdicts"]}},
        "student": None,
    },
    "evaluation": [{"judge": {"n": 8}, "after": ["base", "experts"]}],
}  # fmt: skip


def parity(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    """A verdict for every answer of a model of random weights: yes if the sum of its tokens is even."""
    time.sleep(0.01)  # so that the driver's death meets a stage that is not over
    return float((sum(token_ids) % 2 == 0) == (problem.answer == "yes") if token_ids else text == problem.answer)


def start(directory: Path, name: str) -> Command:
    (directory / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return Command("run", "recipe.yaml", "--name", name, directory=directory)


def test_a_judged_stage_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    undisturbed, disturbed = start(tmp_path, "whole"), start(tmp_path, "killed")
    disturbed.wait_until(lambda: steps_of(killed, STAGE) >= 2)
    disturbed.process.kill()
    disturbed.process.wait()
    until_nothing_runs(disturbed)
    before = {name: request.token_ids for name, request in recover(killed / "rollouts").requests.items()}
    judged = [name for name in before if name.startswith(f"{STAGE}/judge/verdicts/")]
    assert judged and len(judged) < len(before)
    assert 2 <= steps_of(killed, STAGE) < STEPS

    resumed = Command("resume", "runs/killed", directory=tmp_path)
    assert resumed.wait() == 0, resumed.output
    assert undisturbed.wait() == 0, undisturbed.output
    (total,), (rest,) = tokens_sampled(whole), tokens_sampled(killed)
    assert rest == total - sum(map(len, before.values())), "nothing is sampled twice, verdicts included"
    assert contents(killed / "checkpoints") == contents(whole / "checkpoints")
    assert losses(killed)[-STEPS:] == losses(whole)
    assert recover(killed / "rollouts").requests == {}

    steps = [record["metrics"] for record in records(whole) if record.get("stage") == STAGE and "step" in record]
    assert any(0 < metrics["reward/sums/rubric"] < 1 for metrics in steps), "verdicts came from the engines"
    assert all("reward/verdicts/tests.test_judge_run:parity" in metrics for metrics in steps), "and it learned to judge"
    report = json.loads((whole / "report.json").read_text())
    assert [hook["model"] for hook in report["hooks"]] == ["base", STAGE]
    assert 0 <= report["hooks"][1]["metrics"]["verdicts/agreement"] <= 1
