"""Asynchronous training through the real service: the tiny V4, vLLM engines in Ray actors, updates in flight."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from posttrain.data.encoding import encode_continuation, encode_prompt
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import GrpoStage, OptimizerConfig
from posttrain.trainers.generation import Sampled
from posttrain.trainers.grpo import train_grpo
from posttrain.trainers.jobs import GrpoJob, Prompt, Reward
from posttrain.trainers.progress import Progress
from rollouts.environments import Limits, Observation
from rollouts.pool import RolloutClient, RolloutPool
from rollouts.settings import engine_settings, write_description
from rollouts.types import GroupRequest
from tests.episode_kit import TOKENIZER, LocalEpisodes
from tests.test_trainers_grpo import share_of_target
from tests.trainers_kit import EOS, PAD, Recorder, prompts, tiny_tokenizer

ENGINE = {"max_model_len": 96, "max_num_seqs": 64, "max_num_batched_tokens": 512, "kv_cache_mib": 32}
TEXTS = ["what?", "say something", "a", "hello 1234", "b=", "why not?", "c", "12+3="]
MAX_NEW_TOKENS = 48


def v4_model() -> DeepseekV4ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV4ForCausalLM(
        make_config("tiny", vocab_size=len(TOKENIZER), bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutClient]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    directory = tmp_path_factory.mktemp("async")
    v4_model().save_pretrained(directory / "checkpoint")
    write_description(directory / "checkpoint", directory / "description", "native")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        settings = engine_settings(directory / "description", "native", RolloutConfig(**ENGINE), threads=1)
        with RolloutPool(settings, workers=2, directory=directory / "log") as pool:
            yield pickle.loads(pickle.dumps(pool.client()))
    finally:
        ray.shutdown()


def train(
    client: RolloutClient,
    name: str,
    rollout: RolloutConfig,
    steps: int = 6,
    reward: Reward = share_of_target,
    **options: Any,
) -> tuple[Any, Recorder, Sampled]:
    model, recorder = v4_model(), Recorder()
    config = GrpoStage(
        kind="grpo", steps=steps, prompts_per_step=4, group_size=4, optimizer=OptimizerConfig(lr=1e-3),
        importance={"level": "token", "bound": "truncate", "max": 2}, **options,
    )  # fmt: skip
    job = GrpoJob(name, config, "", "", prompts("d", TEXTS), MAX_NEW_TOKENS, reward, rollout)
    sampled = train_grpo(model, tiny_tokenizer(), job, client, 3, Progress(recorder, name, steps))
    return model, recorder, sampled


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_tokens_of_the_weights_that_are_trained_have_the_trainers_logprobs(client: RolloutClient) -> None:
    _, recorder, sampled = train(client, "in-flight", RolloutConfig(mode="async", max_staleness=2, **ENGINE))
    assert sampled.difference.tokens > 0
    assert sampled.difference.largest < 1e-5
    assert 0 < sampled.off_policy["staleness_mean"] <= sampled.off_policy["staleness_max"]
    assert len(sampled.publish_seconds) == len(recorder.lines) == 6
    shares = [value for name, value in sampled.off_policy.items() if name.startswith("version_spans/")]
    assert sum(shares) == pytest.approx(1)
    stats = client.service_stats()
    assert (stats.waiting, stats.running) == (0, 0)


def test_routes_and_masks_come_from_the_engines_and_are_what_the_trainer_uses(client: RolloutClient) -> None:
    _, recorder, sampled = train(client, "kept", RolloutConfig(**ENGINE), steps=3, keep_routing=True, top_p=0.8)
    assert sampled.difference.tokens > 0 and sampled.difference.largest < 1e-5
    assert len(recorder.lines) == 3


def test_a_deterministic_run_gives_the_same_weights_to_the_bit(client: RolloutClient) -> None:
    rollout = RolloutConfig(mode="async", deterministic=True, **ENGINE)
    one, recorder, sampled = train(client, "steady", rollout)
    other, again, _ = train(client, "steady-again", rollout)
    assert same(one, other)
    assert [line["loss"] for line in recorder.lines] == [line["loss"] for line in again.lines]
    assert sampled.off_policy["staleness_max"] == 1
    assert sampled.off_policy["version_spans/1"] == 1
    assert len(sampled.publish_seconds) == 5


def test_a_stage_that_starts_again_gives_the_same_weights(client: RolloutClient) -> None:
    one, _, _ = train(client, "again", RolloutConfig(**ENGINE), steps=3)
    other, _, sampled = train(client, "again", RolloutConfig(**ENGINE), steps=3)
    assert same(one, other)
    assert sampled.difference.largest < 1e-5


def test_a_killed_worker_changes_nothing_of_a_deterministic_run(client: RolloutClient) -> None:
    rollout = RolloutConfig(mode="async", deterministic=True, **ENGINE)
    undisturbed, *_ = train(client, "undisturbed", rollout)
    killed: list[int] = []

    def kill_once(problem_ids: Any, completion_ids: Any, finish_reasons: Any) -> Any:
        if not killed:  # while the first batch is scored, the second is being asked for
            killed.append(next(iter(client.service_stats().workers.values())))
            os.kill(killed[0], signal.SIGKILL)
        return share_of_target(problem_ids, completion_ids, finish_reasons)

    disturbed, *_ = train(client, "disturbed", rollout, reward=kill_once)
    assert killed[0] not in client.service_stats().workers.values()
    assert client.service_stats().deaths >= 1
    assert same(undisturbed, disturbed)


class Curious:
    """Asks for more after every turn."""

    def reset(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "Say it."}]

    def step(self, turn: Any) -> Observation:
        return Observation(({"role": "user", "content": "And?"},))


class Asked:
    """The client, with a note of what is asked of it."""

    def __init__(self, client: RolloutClient) -> None:
        self.client = client
        self.requests: list[GroupRequest] = []

    def submit(self, groups: Any) -> None:
        self.requests += groups
        self.client.submit(groups)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


def converse(client: RolloutClient, name: str, rollout: RolloutConfig) -> tuple[Any, Recorder, Sampled, Asked]:
    """Two steps of GRPO on conversations of up to four turns."""
    model, recorder, asked = v4_model(), Recorder(), Asked(client)
    config = GrpoStage(
        kind="grpo", steps=2, prompts_per_step=2, group_size=8, optimizer=OptimizerConfig(lr=1e-3),
        importance={"level": "token", "bound": "truncate", "max": 2},
    )  # fmt: skip
    prompt = Prompt("d/0", "d", tuple(encode_prompt(TOKENIZER, Curious().reset())))
    episodes = LocalEpisodes({"d/0": Curious}, Limits(turns=4, tokens=0, turn_tokens=40))
    job = GrpoJob(name, config, "", "", [prompt], 76, share_of_target, rollout, episodes=episodes)
    sampled = train_grpo(model, TOKENIZER, job, asked, 3, Progress(recorder, name, 2))  # type: ignore[arg-type]
    return model, recorder, sampled, asked


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_turns_of_episodes_have_the_trainers_logprobs_and_are_the_same_again(client: RolloutClient, mode: str) -> None:
    rollout = RolloutConfig(mode=mode, deterministic=mode == "async", **ENGINE)
    model, recorder, sampled, first = converse(client, f"episodes-{mode}", rollout)
    again, *_, second = converse(client, f"episodes-{mode}", rollout)
    assert sampled.difference.largest < 1e-5
    assert sum(line["turns"] for line in recorder.lines) > 2  # some had a second turn
    assert all(line["loss"] != 0 for line in recorder.lines)
    follow = encode_continuation(TOKENIZER, [{"role": "user", "content": "And?"}])
    later = [request for request in first.requests if not request.id.endswith("/0")]
    assert later and all(request.prompt_ids[-len(follow) :] == follow for request in later)
    assert {one.id: one for one in first.requests} == {one.id: one for one in second.requests}
    assert same(model, again)
    stats = client.service_stats()
    assert (stats.waiting, stats.running, stats.ready_groups) == (0, 0, 0)
