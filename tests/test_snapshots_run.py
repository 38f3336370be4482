"""A run of all kinds of stages that is killed or hangs in each of them ends with an undisturbed run's weights."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.data import Problem
from tests.pipeline_kit import Command, contents, records, steps_of
from tests.test_async_resume import RECIPE as SMALL
from tests.test_async_resume import until_nothing_runs

GRPO = "expert/sums/grpo"
STEPS = {"base": 40, GRPO: 8, "student": 10}
SUMS = {**SMALL["domains"]["sums"], "reward": ["tests.test_snapshots_run:share_of_even_tokens"]}
RECIPE = {
    **SMALL,
    "name": "disturbed",
    "domains": {"sums": SUMS},
    "stages": {
        "base": {"steps": STEPS["base"], "batch_size": 8, "optimizer": {"name": "muon", "lr": 0.002}},
        "experts": {"per_domain": [{"kind": "grpo", "steps": STEPS[GRPO], "prompts_per_step": 4, "group_size": 4}]},
        "student": {"steps": STEPS["student"], "batch_size": 4},
    },
    "snapshots": {"every": 2},
    "watchdog": {"action": "replace", "phases": {"rewarding": 6}},
}
HANG = Path("hang")
"""While this file is there, the reward hangs, once."""


def share_of_even_tokens(problem: Problem, text: str, token_ids: list[int], finish_reason: str) -> float:
    """Half of it at most, unless the answer is right."""
    time.sleep(0.03)  # so that a death meets a stage that is not over
    if HANG.exists():
        HANG.unlink()
        time.sleep(10_000)
    if text == problem.answer:
        return 1.0
    return 0.5 * sum(token % 2 == 0 for token in token_ids) / max(1, len(token_ids))


def starts(run: Path) -> list[tuple[str, int]]:
    """Of stages: from which step on."""
    return [(one["stage"], one.get("step", 0)) for one in records(run) if one.get("event") == "stage_started"]


def losses(run: Path) -> dict[tuple[str, int], Any]:
    """The last that was recorded of each step."""
    return {(one["stage"], one["step"]): one["metrics"]["loss"] for one in records(run) if "metrics" in one}


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    """Whatever a test starts and leaves is ended."""
    started: list[Command] = []
    yield started
    for process in [process for command in started for process in command.left_over()]:
        process.kill()


def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path, commands: list[Command]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "disturbed"

    def start(*arguments: str) -> Command:
        commands.append(Command(*arguments, directory=tmp_path))
        return commands[-1]

    undisturbed = start("run", "recipe.yaml", "--name", "whole", "--set", "snapshots=null")
    first = start("run", "recipe.yaml", "--name", "disturbed")
    first.wait_until(lambda: steps_of(run, "base") >= 5)
    (trainer,) = [one for one in first.left_over() if one.cmdline()[0].startswith("ray::TrainerActor.sft")]
    trainer.send_signal(signal.SIGKILL)
    assert first.wait(120) == 1, first.output
    assert "a trainer died" in first.output and first.left_over() == []

    second = start("resume", "disturbed")
    second.wait_until(lambda: steps_of(run, GRPO) >= 3)
    (tmp_path / HANG).touch()
    second.wait_until(lambda: steps_of(run, "student") >= 3)
    second.process.kill()
    second.process.wait()
    until_nothing_runs(second)

    third = start("resume", "disturbed")
    assert third.wait() == 0, third.output
    assert undisturbed.wait() == 0, undisturbed.output
    assert contents(run / "checkpoints") == contents(whole / "checkpoints")
    assert losses(run) == losses(whole)
    assert not any((run / "snapshots").iterdir()) and not (whole / "snapshots").exists()

    begun = starts(run)
    assert [stage for stage, _ in begun] == ["base", "base", GRPO, GRPO, "student", "student"]
    assert [step for _, step in begun[0::2]] == [0, 0, 0]
    for stage, step in begun[1::2]:
        assert 2 <= step < STEPS[stage], begun
    (stuck,) = [one for one in records(run) if one.get("event") == "stuck"]
    assert (stuck["actor"], stuck["phase"], stuck["action"]) == ("trainer 0", "rewarding", "replace")
    assert "share_of_even_tokens" in stuck["stacks"] and "0 samples waiting" in stuck["queues"]
    assert "STUCK: trainer 0 (process" in second.output and "share_of_even_tokens" in second.output
    assert "Going on with new actors" in second.output
