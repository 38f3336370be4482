"""The model as its own judge on a real engine: verdicts come from the weights it serves, and are kept in the log."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray

from posttrain.data import Problem
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.stages.scoring import DomainRewards
from posttrain.trainers.jobs import bind_reward
from rollouts.pool import RolloutPool
from rollouts.settings import engine_settings, write_description
from tests.judge_kit import CRITERIA, TOKENIZER, judged_recipe, question

STAGE = "expert/sums/grpo"
VOTES = 8
RECIPE = judged_recipe(
    {
        "domains.sums.reward": [
            "exact",
            {"rubric": {"judge": {"actor": "verdicts", "votes": VOTES}, "criteria": CRITERIA}},
        ],
        "domains.verdicts.reward": ["tests.test_judge_engine:parity"],
        "rollout.max_num_seqs": 16,
        "rollout.max_num_batched_tokens": 256,
        "rollout.kv_cache_mib": 16,
    }
)
PROBLEMS = [question(f"{n} + {n + 1}=", str(2 * n + 1)) for n in range(6)]


def parity(problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> float:
    """A verdict for whatever a model of random weights says: yes if the sum of its tokens is even."""
    return float((sum(token_ids) % 2 == 0) == (problem.answer == "yes"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of random weights and what an engine is started from, on a Ray cluster."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    directory = tmp_path_factory.mktemp("judge")
    tokens = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = DeepseekV4ForCausalLM(make_config("tiny", vocab_size=len(TOKENIZER), **tokens))
    for place in ("checkpoint", "tokenizer"):
        TOKENIZER.save_pretrained(directory / place)
    model.save_pretrained(directory / "checkpoint")
    write_description(directory / "checkpoint", directory / "description", "native")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield directory
    finally:
        ray.shutdown()


def life(engine: Path) -> tuple[list[list[float]], int]:
    """A service that begins with what the log has: what a stage's reward says of the reference answers in two calls,
    and how many tokens were sampled for it."""
    settings = engine_settings(engine / "description", "native", RECIPE.rollout, threads=1)
    with RolloutPool(settings, workers=1, directory=engine / "log") as pool:
        client = pool.client()
        client.load_checkpoint(engine / "checkpoint", 1)
        rewards = DomainRewards(RECIPE, str(engine / "tokenizer"), PROBLEMS, STAGE)
        bind_reward(rewards, client, STAGE)
        answers = [
            [*TOKENIZER.encode(one.answer, add_special_tokens=False), TOKENIZER.eos_token_id] for one in PROBLEMS
        ]
        found = []
        for _ in range(2):
            _, parts = rewards([one.id for one in PROBLEMS], answers, ["stop"] * len(PROBLEMS))
            found.append([part["rubric"] for part in parts])
        return found, client.stats()[0].tokens


def test_verdicts_are_sampled_once_and_found_in_the_log_by_the_next_life_of_a_stage(engine: Path) -> None:
    first, sampled = life(engine)
    assert sampled >= 2 * len(PROBLEMS) * VOTES
    assert all(0 <= grade <= 1 for call in first for grade in call)
    assert len({grade for call in first for grade in call}) > 2, "votes differ"
    assert first[0] != first[1], "calls have random numbers of their own"
    assert life(engine) == (first, 0)
