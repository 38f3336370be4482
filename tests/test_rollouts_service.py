"""The rollout service as the trainers see it: real vLLM engines in real Ray actors, a tiny random Qwen3."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from posttrain.errors import BadInput, RunFailed
from posttrain.recipe.schema import RolloutConfig
from rollouts.pool import RolloutClient, RolloutPool
from rollouts.settings import engine_settings, write_description
from rollouts.types import Completion, GroupRequest, Sampling
from rollouts.weights import WeightUpdate
from tests.tiny_models import save_tiny_qwen3, tiny_qwen3

TOLERANCE = 1e-5
ROLLOUT = RolloutConfig(engine="vllm", max_model_len=256, max_num_seqs=64, max_num_batched_tokens=512, kv_cache_mib=32)


@dataclass
class Service:
    pool: RolloutPool
    client: RolloutClient
    model: Any
    """The transformers model whose weights were published last."""
    directory: Path
    refusal: str
    """What an engine said when it was asked to generate before its first weights."""

    def publish(self, model: Any) -> int:
        version = (self.client.weight_version() or 0) + 1
        self.client.publish(model.state_dict(), version)
        self.model = model
        return version


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    directory = tmp_path_factory.mktemp("rollouts")
    model = save_tiny_qwen3(directory / "checkpoint", seed=0)
    write_description(directory / "checkpoint", directory / "description", "vllm")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with RolloutPool(engine_settings(directory / "description", "vllm", ROLLOUT, threads=1), workers=2) as pool:
            client = pickle.loads(pickle.dumps(pool.client()))
            with pytest.raises(RunFailed) as refusal:
                client.generate([[5, 6, 7]], Sampling(max_tokens=2))
            client.publish(model.state_dict(), 1)
            yield Service(pool, client, model, directory, str(refusal.value))
    finally:
        ray.shutdown()


def random_prompts(count: int, seed: int = 0, shortest: int = 3, longest: int = 60) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(4, 128) for _ in range(generator.randint(shortest, longest))] for _ in range(count)]


def reference_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """transformers' fp32 log-softmax for each completion token, in one forward pass."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return logprobs_TV[torch.arange(len(completion)), torch.tensor(completion)].tolist()


def largest_difference(service: Service, prompts: list[list[int]], groups: list[list[Completion]], t: float) -> float:
    """Sampler against transformers over every token; infinite when either has something that is not a number."""
    largest = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            theirs = reference_logprobs(service.model, prompt, completion.token_ids, t)
            for ours, reference in zip(completion.logprobs, theirs, strict=True):
                difference = abs(ours - reference)
                largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def test_an_engine_refuses_to_generate_before_its_first_weights(service: Service) -> None:
    assert "no weights" in service.refusal


@pytest.mark.parametrize("seed", [None, 7], ids=["before an update", "after an update"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_the_models_own(service: Service, temperature: float, seed: int | None) -> None:
    if seed is not None:
        service.publish(tiny_qwen3(seed))
    prompts = random_prompts(24)
    groups = service.client.generate(prompts, Sampling(max_tokens=24, temperature=temperature, n=2, seed=3))
    assert largest_difference(service, prompts, groups, temperature) <= TOLERANCE


def test_an_update_changes_what_is_sampled_and_a_stale_model_would_show(service: Service) -> None:
    prompts, sampling = random_prompts(8), Sampling(max_tokens=16)
    old_model, old = service.model, service.client.generate(prompts, sampling)
    service.publish(tiny_qwen3(11))
    new = service.client.generate(prompts, sampling)
    assert tokens(old) != tokens(new)
    stale = copy.copy(service)
    stale.model = old_model
    assert largest_difference(stale, prompts, new, 1.0) > 1000 * TOLERANCE


def test_every_completion_says_which_weights_sampled_it(service: Service) -> None:
    version = service.publish(tiny_qwen3(12))
    groups = service.client.generate(random_prompts(5), Sampling(max_tokens=4, n=3))
    assert [len(group) for group in groups] == [3] * 5
    assert {completion.weight_version for group in groups for completion in group} == {version}
    assert [stats.version for stats in service.client.stats()] == [version, version]


def test_versions_must_grow(service: Service) -> None:
    version = service.publish(tiny_qwen3(13))
    with pytest.raises(RunFailed, match="versions must grow"):
        service.client.publish(service.model.state_dict(), version)
    assert service.client.weight_version() == version


def test_what_is_sampled_depends_on_neither_the_workers_nor_the_batch(service: Service) -> None:
    prompts, sampling = random_prompts(20), Sampling(max_tokens=16, n=2, seed=5)
    both = service.client.generate(prompts, sampling)
    one = service.pool.client(1, 2).generate(prompts, sampling)
    assert tokens(both) == tokens(one)
    assert tokens(service.client.generate(prompts[:1], sampling)) == tokens(both)[:1]


def test_samples_of_a_group_seeds_and_rows_have_streams_of_their_own(service: Service) -> None:
    prompt = random_prompts(1)[0]
    first = tokens(service.client.generate([prompt] * 4, Sampling(max_tokens=16, n=4, seed=1)))
    other = tokens(service.client.generate([prompt] * 4, Sampling(max_tokens=16, n=4, seed=2)))
    streams = {tuple(ids) for groups in (first, other) for group in groups for ids in group}
    assert len(streams) == 32


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_models_distribution(service: Service, temperature: float) -> None:
    prompt, n = random_prompts(1, seed=9)[0], 4000
    with torch.no_grad():
        logits_V = service.model(torch.tensor([prompt])).logits[0, -1]
    expected = (torch.softmax(logits_V / temperature, dim=-1) * n).tolist()
    (group,) = service.client.generate([prompt], Sampling(max_tokens=1, temperature=temperature, n=n, seed=4))
    counts = Counter(completion.token_ids[0] for completion in group)
    frequent = [token for token, count in enumerate(expected) if count >= 5]
    rest_expected = n - sum(expected[token] for token in frequent)
    rest = n - sum(counts[token] for token in frequent)
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in frequent)
    chi_square += (rest - rest_expected) ** 2 / max(rest_expected, 5)
    degrees = len(frequent)
    assert degrees > 20
    # Five standard deviations of the chi-square distribution.
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_prompts_split_over_steps_keep_their_streams(service: Service) -> None:
    """More waiting tokens than one step takes: prompts are prefilled in chunks, among others that decode."""
    prompts = random_prompts(16, shortest=150, longest=230)
    sampling = Sampling(max_tokens=8, n=2, seed=6)
    assert sum(map(len, prompts)) > 2 * ROLLOUT.max_num_batched_tokens
    client = service.pool.client(0, 2)
    groups = client.generate(prompts, sampling)
    assert largest_difference(service, prompts, groups, 1.0) <= TOLERANCE
    for row in (0, 7, 15):
        client.submit([GroupRequest(f"alone/{row}", prompts[row], sampling, index=row)])
        (alone,) = client.collect(1)
        assert tokens([alone.completions]) == tokens(groups)[row : row + 1]
        client.acknowledge([alone.request.id])


def test_decode_agrees_with_prefill(service: Service) -> None:
    prompts = random_prompts(12)
    groups = service.client.generate(prompts, Sampling(max_tokens=24, seed=8))
    scores = service.client.score(prompts, [group[0].token_ids for group in groups])
    for (completion,), row in zip(groups, scores, strict=True):
        assert row == pytest.approx(completion.logprobs, abs=TOLERANCE, rel=0)


def test_a_text_that_fills_the_context_can_be_sampled_and_scored(service: Service) -> None:
    prompt = random_prompts(1, shortest=ROLLOUT.max_model_len - 4, longest=ROLLOUT.max_model_len - 4)[0]
    completion = [7, 8, 9, 10]
    (scores,) = service.client.score([prompt], [completion])
    assert scores == pytest.approx(reference_logprobs(service.model, prompt, completion, 1.0), abs=TOLERANCE, rel=0)
    ((sampled,),) = service.client.generate([prompt], Sampling(max_tokens=4))
    assert len(sampled.token_ids) == 4 or sampled.finish_reason == "stop"


def test_the_end_token_ends_a_completion_and_is_its_last(service: Service) -> None:
    eos = service.model.config.eos_token_id
    model = tiny_qwen3(14)
    with torch.no_grad():  # make the end token likely: some completions end with their first token, some do not end
        model.lm_head.weight[eos] *= 4
    service.publish(model)
    groups = service.client.generate(random_prompts(32), Sampling(max_tokens=6, n=4))
    reasons = Counter(completion.finish_reason for group in groups for completion in group)
    assert reasons["stop"] > 5 and reasons["length"] > 5 and set(reasons) == {"stop", "length"}
    for completion in (completion for group in groups for completion in group):
        assert eos not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == eos) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == len(completion.logprobs)
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 6
    assert any(completion.token_ids == [eos] for group in groups for completion in group)


def test_greedy_takes_the_most_likely_token(service: Service) -> None:
    prompts = random_prompts(6)
    groups = service.client.generate(prompts, Sampling(max_tokens=1, temperature=0.0))
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        with torch.no_grad():
            logits_V = service.model(torch.tensor([prompt])).logits[0, -1]
        assert completion.token_ids == [int(logits_V.argmax())]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt 2 is empty"),
        ([5] * 300, "prompt 2 has 300 tokens"),
        ([5] * 250, "max_model_len is 256"),
        ([5, 128], "outside the model's vocabulary"),
        ([-1], "prompt 2 has a token id"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_rejected_by_row(service: Service, prompt: list[int], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        service.client.generate([[5], [6], prompt, [7]], Sampling(max_tokens=8))
    groups = [
        GroupRequest(f"row/{row}", ids, Sampling(max_tokens=8)) for row, ids in enumerate([[5], [6], prompt, [7]])
    ]
    with pytest.raises(BadInput, match=words):
        service.client.submit(groups)
    rejected = service.client.submit_valid(groups)
    assert list(rejected) == [2] and re.search(words, rejected[2])
    assert {group.request.id for group in service.client.collect(3)} == {"row/0", "row/1", "row/3"}
    service.client.acknowledge(["row/0", "row/1", "row/3"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 0}, "prompt 1 asks for sampling.n 0"),
        ({"max_tokens": 0}, "prompt 1 asks for sampling.max_tokens 0"),
        ({"stop_token_ids": (3, 128)}, "prompt 1 has the stop token 128"),
        ({"temperature": -1.0}, r"prompt 1 asks for sampling.temperature -1"),
        ({"top_p": 0.0}, r"prompt 1 asks for sampling.top_p 0"),
    ],
)
def test_sampling_that_makes_no_sense_is_rejected_by_row(service: Service, fields: dict[str, Any], words: str) -> None:
    good = Sampling(max_tokens=2)
    with pytest.raises(BadInput, match=words):
        service.client.submit([GroupRequest("a", [5], good), GroupRequest("b", [5], replace(good, **fields))])


def test_ids_are_unique(service: Service) -> None:
    one = GroupRequest("same", [5], Sampling(max_tokens=2))
    with pytest.raises(BadInput, match="prompt 1 has the id 'same'"):
        service.client.submit([one, one])
    with pytest.raises(RunFailed, match="'same' is not waited for"):
        service.client.collect(1, ["same"])


def test_weights_that_do_not_fit_are_refused_by_name_and_the_engine_then_serves_nothing(service: Service) -> None:
    version = (service.client.weight_version() or 0) + 1
    complete = tiny_qwen3(15).state_dict()
    name = "model.layers.1.self_attn.k_proj.weight"
    faults = {
        f"missing: {name}": {key: value for key, value in complete.items() if key != name},
        "unknown to the engine: model.surplus.weight": {**complete, "model.surplus.weight": torch.zeros(2)},
        f"{name} has shape": {**complete, name: complete[name].T.contiguous()},
    }
    for words, weights in faults.items():
        with pytest.raises(RunFailed, match=words):
            service.client.publish(weights, version)
        with pytest.raises(RunFailed, match="no weights"):
            service.client.generate([[5]], Sampling(max_tokens=1))
    service.client.publish(complete, version)
    service.model = tiny_qwen3(15)
    assert len(service.client.generate([[5]], Sampling(max_tokens=1))) == 1


def test_weights_damaged_on_the_way_never_reach_the_engine(service: Service) -> None:
    version = service.client.weight_version() or 0
    update = WeightUpdate.pack(tiny_qwen3(16).state_dict(), version + 1)
    update.tensors["model.norm.weight"].bits[3] += 1e-6
    with pytest.raises(RunFailed, match=r"model\.norm\.weight"):
        service.client._call("publish", (0, 1), [ray.put(update)])
    ((completion,),) = service.client.generate([[5]], Sampling(max_tokens=1))
    assert completion.weight_version == version


def test_a_checkpoint_is_loaded_from_disk_by_every_worker(service: Service, tmp_path: Path) -> None:
    model = save_tiny_qwen3(tmp_path / "other", seed=17)
    version = (service.client.weight_version() or 0) + 1
    service.client.load_checkpoint(tmp_path / "other", version)
    service.model = model
    prompts = random_prompts(8)
    groups = service.client.generate(prompts, Sampling(max_tokens=8))
    assert largest_difference(service, prompts, groups, 1.0) <= TOLERANCE
    with pytest.raises(BadInput, match="no checkpoint here"):
        service.client.load_checkpoint(tmp_path / "nothing", version + 1)


def test_stats_count_tokens_and_time(service: Service) -> None:
    before = service.client.stats()
    groups = service.client.generate(random_prompts(10), Sampling(max_tokens=5, n=2))
    after = service.client.stats()
    sampled = sum(len(completion.token_ids) for group in groups for completion in group)
    assert sum(s.tokens for s in after) - sum(s.tokens for s in before) == sampled
    assert sum(s.completions for s in after) - sum(s.completions for s in before) == 20
    assert all(new.busy_seconds > old.busy_seconds for old, new in zip(before, after, strict=True))
    assert all(100 << 20 < s.rss_bytes < 2 << 30 for s in after)


def test_stopping_a_pool_ends_its_workers_only(service: Service, tmp_path: Path) -> None:
    """A second pool, with tied embeddings: its weights are complete without the head."""
    model = save_tiny_qwen3(tmp_path / "checkpoint", seed=18, tied=True)
    write_description(tmp_path / "checkpoint", tmp_path / "description", "vllm")
    pool = RolloutPool(engine_settings(tmp_path / "description", "vllm", ROLLOUT, threads=1), workers=1)
    client = pool.client()
    client.load_checkpoint(tmp_path / "checkpoint", 1)
    client.publish(model.state_dict(), 2)
    prompts = random_prompts(4)
    tied = copy.copy(service)
    tied.model = model
    assert largest_difference(tied, prompts, client.generate(prompts, Sampling(max_tokens=8)), 1.0) <= TOLERANCE
    state = client.service_stats()
    pool.stop()
    processes = [psutil.Process(pid) for pid in (state.pid, *state.workers.values()) if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=30)  # `ray.kill` does not wait for the end
    assert not alive
    assert service.client.service_stats().ready == [0, 1]


def test_a_context_longer_than_the_models_is_refused(service: Service) -> None:
    settings = engine_settings(
        service.directory / "description", "vllm", ROLLOUT.model_copy(update={"max_model_len": 513}), threads=1
    )
    with pytest.raises(BadInput, match=r"rollout\.max_model_len is 513.*512"):
        RolloutPool(settings, workers=1)
