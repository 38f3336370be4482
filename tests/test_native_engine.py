"""Our V4 inside vLLM against our V4 in the trainer: log-probabilities of every sampled token, on real engines.

Prompts are longer than `max_num_batched_tokens`, so prefill is chunked; some share prefixes, so the prefix cache is
hit; top-k selection cuts (4 of up to 40 entries); groups of requests run together.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch

from posttrain.errors import BadInput, RunFailed
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.layers import Gate
from posttrain.recipe.schema import RolloutConfig
from posttrain.trainers.masked import masked_logprob
from rollouts.pool import RolloutClient, RolloutPool
from rollouts.settings import engine_settings, write_description
from rollouts.types import Completion, GroupRequest, Sampling
from tests.v4_models import VOCABULARY, our_model

BOUND = 1e-5
ROLLOUT = RolloutConfig(engine="native", max_model_len=192, max_num_seqs=16, max_num_batched_tokens=64, kv_cache_mib=32)


@dataclass
class Native:
    client: RolloutClient
    model: DeepseekV4ForCausalLM
    directory: Path
    version: int = 0

    def next_version(self) -> int:
        self.version += 1
        return self.version

    def publish(self, model: DeepseekV4ForCausalLM) -> None:
        self.client.publish(model.engine_state_dict(), self.next_version())
        self.model = model


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Native]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    directory = tmp_path_factory.mktemp("native")
    model = our_model(0)
    model.save_pretrained(directory / "checkpoint")
    write_description(directory / "checkpoint", directory / "description", "native")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with RolloutPool(engine_settings(directory / "description", "native", ROLLOUT, threads=1), workers=1) as pool:
            service = Native(pool.client(), model, directory)
            service.publish(model)
            yield service
    finally:
        ray.shutdown()


def prompts(seed: int = 0) -> list[list[int]]:
    """Lengths around every boundary: of blocks, windows, pages, chunks; two share 40 tokens."""
    torch.manual_seed(seed)
    lengths = [1, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 65, 90, 150]
    made = [torch.randint(2, VOCABULARY, (length,)).tolist() for length in lengths]
    made.append(made[-2][:40] + torch.randint(2, VOCABULARY, (30,)).tolist())
    return made


def trainer_logprobs(
    model: DeepseekV4ForCausalLM, prompt: list[int], answer: list[int], temperature: float
) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits_TV / temperature, -1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)


def largest_difference(
    native: Native, asked: list[list[int]], groups: list[list[Completion]], temperature: float
) -> float:
    worst = 0.0
    for prompt, group in zip(asked, groups, strict=True):
        for sample in group:
            ours = trainer_logprobs(native.model, prompt, sample.token_ids, temperature)
            difference = (ours - torch.tensor(sample.logprobs)).abs()
            assert torch.isfinite(difference).all()
            worst = max(worst, difference.max().item())
    return worst


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("update", [False, True], ids=["before an update", "after an update"])
def test_sampled_logprobs_are_the_trainers(native: Native, temperature: float, update: bool) -> None:
    if update:
        native.publish(our_model(17))
    groups = native.client.generate(prompts(), Sampling(max_tokens=40, temperature=temperature, n=2, seed=5))
    assert largest_difference(native, prompts(), groups, temperature) <= BOUND


def test_a_cached_prefix_changes_nothing(native: Native) -> None:
    sampling = Sampling(max_tokens=20, seed=9)
    first = native.client.generate(prompts(3), sampling)
    again = native.client.generate(prompts(3), sampling)
    assert [group[0].token_ids for group in first] == [group[0].token_ids for group in again]
    for one, other in zip(first, again, strict=True):
        assert torch.tensor(one[0].logprobs).sub(torch.tensor(other[0].logprobs)).abs().max() <= BOUND


def test_alone_and_in_a_batch_are_the_same(native: Native) -> None:
    asked = prompts(4)
    together = native.client.generate(asked, Sampling(max_tokens=16, temperature=1.0, seed=2))
    answers = [group[0].token_ids for group in together]
    for prompt, answer, group in zip(asked, answers, together, strict=True):
        alone = native.client.score([prompt], [answer])[0]
        assert torch.tensor(alone).sub(torch.tensor(group[0].logprobs)).abs().max() <= BOUND


def test_decoding_and_prefill_are_the_same(native: Native) -> None:
    asked = prompts(6)
    decoded = native.client.generate(asked, Sampling(max_tokens=40, seed=1))
    prefilled = native.client.score(asked, [group[0].token_ids for group in decoded])
    for group, logprobs in zip(decoded, prefilled, strict=True):
        assert torch.tensor(group[0].logprobs).sub(torch.tensor(logprobs)).abs().max() <= BOUND


def test_a_checkpoint_directory_gives_the_same_weights_as_publishing(native: Native) -> None:
    model = our_model(23)
    model.save_pretrained(native.directory / "other")
    native.client.load_checkpoint(native.directory / "other", native.next_version())
    native.model = model
    groups = native.client.generate(prompts(), Sampling(max_tokens=8, seed=0))
    assert largest_difference(native, prompts(), groups, 1.0) <= BOUND


def test_stale_weights_would_show(native: Native) -> None:
    groups = native.client.generate(prompts(), Sampling(max_tokens=8, seed=0))
    stale = Native(native.client, our_model(99), native.directory)
    assert largest_difference(stale, prompts(), groups, 1.0) > 0.1


@pytest.mark.parametrize("name", ["model.layers.1.attn.attn_sink", "model.layers.2.ffn.experts.w2", "lm_head.weight"])
def test_a_missing_tensor_is_refused_by_name(native: Native, name: str) -> None:
    weights = our_model(1).engine_state_dict()
    del weights[name]
    with pytest.raises(RunFailed, match=name):
        native.client.publish(weights, native.next_version())
    native.publish(our_model(0))


def routes_of(model: DeepseekV4ForCausalLM, tokens: list[int]) -> torch.Tensor:
    """What the trainer's routers choose, `[tokens, layers, k]`."""
    chosen: list[torch.Tensor] = []
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    hooks = [gate.register_forward_hook(lambda *call: chosen.append(call[2][0])) for gate in gates]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1)


def test_routes_come_with_completions_also_when_the_engine_dies_on_the_way(native: Native) -> None:
    asked = prompts(7)
    requests = [
        GroupRequest(f"routes/{row}", prompt, Sampling(max_tokens=40, n=2, seed=4, routes=True), row)
        for row, prompt in enumerate(asked)
    ]
    native.client.submit(requests)
    finished = native.client.collect(3)
    os.kill(native.client.stats()[0].pid, signal.SIGKILL)
    while len(finished) < len(requests):
        finished += native.client.collect(len(requests) - len(finished))
    native.client.acknowledge([group.request.id for group in finished])
    for group in finished:
        for completion in group.completions:
            tokens = group.request.prompt_ids + completion.token_ids[:-1]
            assert completion.routes is not None
            assert torch.equal(torch.tensor(completion.routes).long(), routes_of(native.model, tokens))


def test_masks_give_the_trainer_the_samplers_logprobs_also_when_the_engine_dies(native: Native) -> None:
    """Under top-p, to the last bit."""
    sampling, asked = Sampling(max_tokens=40, temperature=0.7, top_p=0.8, n=2, seed=4, masks=True), prompts(8)
    requests = [GroupRequest(f"masks/{row}", prompt, sampling, row) for row, prompt in enumerate(asked)]
    native.client.submit(requests)
    finished = native.client.collect(3)
    os.kill(native.client.stats()[0].pid, signal.SIGKILL)
    while len(finished) < len(requests):
        finished += native.client.collect(len(requests) - len(finished))
    native.client.acknowledge([group.request.id for group in finished])
    head = native.model.get_output_embeddings().weight
    for group in finished:
        for completion in group.completions:
            tokens = group.request.prompt_ids + completion.token_ids[:-1]
            targets = torch.tensor(completion.token_ids)
            assert completion.masks is not None and len(completion.masks) == len(targets)
            with torch.no_grad():
                hidden = native.model.model(torch.tensor([tokens])).last_hidden_state[0, -len(targets) :]
                ours, _ = masked_logprob(hidden, head, targets, 0.7, completion.masks)
            assert ours.tolist() == completion.logprobs
            whole = trainer_logprobs(native.model, group.request.prompt_ids, completion.token_ids, 0.7)
            assert (ours - whole).min() > 0.1  # something was cut off everywhere


def test_a_prompt_that_leaves_no_room_is_refused_by_row(native: Native) -> None:
    with pytest.raises(BadInput, match="prompt 1 "):
        native.client.generate([[5, 6], [7] * 190], Sampling(max_tokens=8))
