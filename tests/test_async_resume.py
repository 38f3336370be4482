"""A driver killed in the middle of an asynchronous stage: the next one finds in the log what was sampled."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from posttrain.data import Problem
from rollouts.log import recover
from tests.pipeline_kit import Command, contents, records, steps_of

STAGE = "expert/sums/grpo"
STEPS = 6
RECIPE: dict[str, Any] = {
    "name": "resumed",
    "model": {"family": "deepseek_v4", "config": "tiny"},
    "cluster": {"dashboard": False},
    "rollout": {
        "max_model_len": 64, "max_num_seqs": 16, "max_num_batched_tokens": 512, "kv_cache_mib": 16,
        "mode": "async", "deterministic": True,
    },
    "domains": {
        "sums": {
            "source": {"reasoning_gym": "chain_sum", "params": {"max_terms": 2}, "prompt": "{metadata[expression]}="},
            "reward": ["tests.test_async_resume:share_of_even_tokens"],
            "train": 40, "selection": 1, "holdout": 1, "max_new_tokens": 24,
        }
    },
    "stages": {
        "experts": {"per_domain": [{"kind": "grpo", "steps": STEPS, "prompts_per_step": 4, "group_size": 4}]},
        "student": None,
    },
    "evaluation": [],
}  # fmt: skip


def share_of_even_tokens(problem: Problem, text: str, token_ids: list[int], finish_reason: str) -> float:
    """Half of it at most, unless the answer is right: something that a model of random weights gets at times."""
    time.sleep(0.01)  # so that the driver's death meets a stage that is not over
    if text == problem.answer:
        return 1.0
    return 0.5 * sum(token % 2 == 0 for token in token_ids) / max(1, len(token_ids))


def start(directory: Path, name: str) -> Command:
    (directory / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return Command("run", "recipe.yaml", "--name", name, directory=directory)


def tokens_sampled(run: Path) -> list[int]:
    """Of the stage, in each of its lives that came to its end."""
    return [record["tokens"] for record in records(run) if record.get("event") == "rollout_stats"]


def logged(run: Path) -> dict[str, list[int]]:
    return {name: request.token_ids for name, request in recover(run / "rollouts").requests.items()}


RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They outlive a killed driver by 60 s: so long they try to tell its dead GCS that their raylet is gone (ray 2.60,
`publish_error_to_driver`). They touch nothing of the run."""


def until_nothing_runs(command: Command) -> None:
    end = time.monotonic() + 60
    while left := [process for process in command.left_over() if named(process) not in RAYS_AGENTS]:
        assert time.monotonic() < end, left
        time.sleep(0.2)


def named(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return "ended"


def test_a_resumed_stage_samples_nothing_twice_and_gives_the_same_weights(tmp_path: Path) -> None:
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    undisturbed, disturbed = start(tmp_path, "whole"), start(tmp_path, "killed")
    disturbed.wait_until(lambda: steps_of(killed, STAGE) >= 3)
    disturbed.process.kill()
    disturbed.process.wait()
    until_nothing_runs(disturbed)
    before = logged(killed)
    done = steps_of(killed, STAGE)
    assert 3 <= done < STEPS
    learned_from = [f"{STAGE}/{step}/{row}#{number}" for step in range(done) for row in range(4) for number in range(4)]
    assert set(learned_from) <= before.keys()

    resumed = Command("resume", "runs/killed", directory=tmp_path)
    assert resumed.wait() == 0, resumed.output
    assert undisturbed.wait() == 0, undisturbed.output
    (total,), (rest,) = tokens_sampled(whole), tokens_sampled(killed)
    assert rest == total - sum(map(len, before.values()))
    assert contents(killed / "checkpoints") == contents(whole / "checkpoints")
    assert losses(killed)[-STEPS:] == losses(whole)
    assert logged(killed) == {}


def losses(run: Path) -> list[Any]:
    return [record["metrics"]["loss"] for record in records(run) if record.get("stage") == STAGE and "step" in record]
