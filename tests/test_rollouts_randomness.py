"""Counter-based sampling: the distribution is exact, and a token depends on its request and position alone."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from posttrain.recipe.schema import RolloutConfig
from rollouts.randomness import GOLDEN, draw, draw_torch, gumbel_noise, position_keys
from rollouts.randomness_triton import draw_triton
from rollouts.settings import engine_environment, engine_settings, write_description
from tests.v4_models import VOCABULARY, our_model

TOO_UNLIKELY = 1e-4
"""The seeds are fixed: a test passes always or never. A false generator gives values far below."""

Sample = tuple[list[int], list[float]]


def keys(seeds: Any, positions: Any) -> torch.Tensor:
    return torch.from_numpy(position_keys(*np.broadcast_arrays(np.uint64(seeds), np.asarray(positions))))


def splitmix64(state: int, steps: int) -> int:
    """Number `steps` of the reference generator (https://prng.di.unimi.it/splitmix64.c)."""
    mask = 2**64 - 1
    value = (state + steps * GOLDEN) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_the_noise_is_the_reference_generators() -> None:
    keys_B = keys(np.arange(5), 7)
    steps_V = torch.from_numpy((np.arange(1, 9, dtype=np.uint64) * np.uint64(GOLDEN)).view(np.int64))
    noise_BV = gumbel_noise(keys_B, steps_V)
    for row, key in enumerate(keys_B.tolist()):
        for token in range(8):
            uniform = ((splitmix64(key, token + 1) >> 12) + 0.5) * 2.0**-52
            assert noise_BV[row, token].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-14)


@pytest.mark.parametrize("over", ["seeds", "positions", "both"])
def test_samples_have_the_models_distribution(over: str) -> None:
    """Over requests, along one request, and over both; the least likely token is expected 60 times."""
    logits = torch.tensor([2.0, 0.3, -1.0, 1.1, -float("inf"), 0.0, -4.5, 1.9])
    count, numbers = 100_000, np.arange(100_000)
    of = {"seeds": (numbers, 40), "positions": (123456789, numbers), "both": (numbers // 300, numbers % 300)}
    tokens = draw(logits.expand(count, -1), keys(*of[over]))
    found = torch.bincount(tokens, minlength=8)
    assert found[4] == 0
    expected = torch.softmax(logits.double(), 0) * count
    inside = expected > 0
    assert expected[inside].min() > 50
    assert stats.chisquare(found[inside].numpy(), expected[inside].numpy()).pvalue > TOO_UNLIKELY


def unmixed(bits: int) -> int:
    """The state whose SplitMix64 output is `bits`."""
    mask = 2**64 - 1
    bits ^= (bits >> 31) ^ (bits >> 62)
    bits = bits * pow(0x94D049BB133111EB, -1, 2**64) & mask
    bits ^= (bits >> 27) ^ (bits >> 54)
    bits = bits * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    return bits ^ (bits >> 30) ^ (bits >> 60)


def test_the_largest_and_the_smallest_number_are_finite_and_far_out() -> None:
    """Float32's 24 bits would end at 16.6: no token below a probability of 6e-8 would ever be drawn."""
    states = np.array([unmixed(2**64 - 1), unmixed(0)], dtype=np.uint64).view(np.int64)
    largest, smallest = gumbel_noise(torch.from_numpy(states), torch.zeros(1, dtype=torch.int64)).flatten().tolist()
    assert largest == pytest.approx(53 * math.log(2), rel=1e-12)
    assert smallest == pytest.approx(-math.log(53 * math.log(2)), rel=1e-12)


def test_noise_is_gumbel_to_its_tails() -> None:
    steps_V = torch.from_numpy((np.arange(1, 1001, dtype=np.uint64) * np.uint64(GOLDEN)).view(np.int64))
    noise = gumbel_noise(keys(np.arange(300), 5), steps_V).flatten().numpy()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > TOO_UNLIKELY
    assert stats.binomtest(int((noise > 10).sum()), noise.size, 1 - math.exp(-math.exp(-10))).pvalue > TOO_UNLIKELY


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, -1), (1 << 32, 0)])
def test_neighbouring_positions_and_seeds_are_independent(shift: tuple[int, int]) -> None:
    logits = torch.zeros(6).expand(60_000, -1)
    seeds, positions = np.arange(60_000) // 200, np.arange(60_000) % 200 + 1
    here = draw(logits, keys(seeds, positions))
    there = draw(logits, keys(seeds + shift[0], positions + shift[1]))
    table = torch.bincount(here * 6 + there, minlength=36).reshape(6, 6).numpy()
    assert stats.chi2_contingency(table).pvalue > TOO_UNLIKELY


def test_all_bits_of_a_seed_count() -> None:
    seeds = np.array([1 << bit for bit in range(64)], dtype=np.uint64)
    assert len(set(keys(seeds, 0).tolist())) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 97, 4096, 9001])
def test_the_kernel_draws_what_the_definition_draws(vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocabulary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (3 * torch.randn(6, vocabulary, device=device)).to(dtype)
    logits[2, vocabulary // 2 :] = -float("inf")
    if vocabulary == 1:
        logits[2] = 0
    keys_B = keys(np.arange(6), 11).to(device)
    assert draw_triton(logits, keys_B).tolist() == draw_torch(logits, keys_B).tolist()
    strided = torch.stack([logits, logits], dim=2)[:, :, 0]
    assert draw_triton(strided, keys_B).tolist() == draw_torch(logits, keys_B).tolist()


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    logits, keys_B = torch.randn(700, 500), keys(np.arange(700), np.arange(700) % 13)
    together = draw_torch(logits, keys_B)
    order = torch.randperm(700)
    assert draw_torch(logits[order], keys_B[order]).tolist() == together[order].tolist()
    assert draw_torch(logits[3:4], keys_B[3:4]).tolist() == together[3:4].tolist()


# A real engine, in a process of its own.

ROLLOUT = RolloutConfig(engine="native", max_model_len=192, max_num_seqs=16, max_num_batched_tokens=64, kv_cache_mib=32)
_engine: Any = None


def start_engine(description: Path) -> None:
    global _engine
    from rollouts.engine import Engine

    _engine = Engine(engine_settings(description, "native", ROLLOUT, threads=1))
    _engine.load_weights(our_model(0).engine_state_dict(), 1)


def sample(requests: list[tuple[list[int], int, int]], temperature: float, top_p: float) -> list[Sample]:
    """Tokens and log-probabilities of requests (prompt, seed, number of tokens), all at once."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = [
        SamplingParams(
            max_tokens=count,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
        )
        for _, seed, count in requests
    ]
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _, _ in requests]
    outputs = [output.outputs[0] for output in _engine._llm.generate(prompts, params, use_tqdm=False)]
    return [
        (
            list(output.token_ids),
            [at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)],
        )
        for output in outputs
    ]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    directory = tmp_path_factory.mktemp("randomness")
    our_model(0).save_pretrained(directory / "checkpoint")
    write_description(directory / "checkpoint", directory / "description", "native")
    with pytest.MonkeyPatch.context() as patched:
        for name, value in engine_environment(threads=1).items():
            patched.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(start_engine, directory / "description").result()
            yield process


def run(engine: ProcessPoolExecutor, requests: list[tuple[list[int], int, int]], *rest: float) -> list[Sample]:
    return engine.submit(sample, requests, *rest).result()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_a_request_resumed_anywhere_gives_the_tokens_of_an_uninterrupted_one(
    engine: ProcessPoolExecutor, temperature: float, top_p: float
) -> None:
    """Prompts longer than a step's budget among them; resumed alone, and among requests of every other length."""
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 5, 17, 33, 64, 65, 90, 150)
    ]
    requests = [(prompt, 2**62 + 97 * row, 24) for row, prompt in enumerate(prompts)]
    whole = run(engine, requests, temperature, top_p)
    assert len({tuple(tokens) for tokens, _ in whole}) == len(whole)
    cuts = [(row, cut) for cut in (1, 2, 7, 16, 23) for row in range(len(prompts))]
    order = torch.randperm(len(cuts), generator=generator).tolist()
    resumed = [(*cuts[at], prompts[cuts[at][0]] + whole[cuts[at][0]][0][: cuts[at][1]]) for at in order]
    again = run(engine, [(text, requests[row][1], 24 - cut) for row, cut, text in resumed], temperature, top_p)
    for (row, cut, _), (tokens, logprobs) in zip(resumed, again, strict=True):
        assert tokens == whole[row][0][cut:]
        assert logprobs == whole[row][1][cut:]
    for row, request in list(enumerate(requests))[::3]:
        assert run(engine, [request], temperature, top_p) == [whole[row]]


def test_the_engine_samples_what_it_reports(engine: ProcessPoolExecutor) -> None:
    """First tokens of 2,000 requests with one prompt, against the log-probabilities that came with them."""
    outcomes = run(engine, [([5, 6, 7], seed, 1) for seed in range(2000)], 1.0, 1.0)
    reported = {tokens[0]: math.exp(logprobs[0]) for tokens, logprobs in outcomes}
    tokens = np.array([tokens[0] for tokens, _ in outcomes])
    frequent = [token for token, share in reported.items() if share * 2000 > 15]
    found = [int((tokens == token).sum()) for token in frequent]
    expected = [2000 * reported[token] for token in frequent]
    rest = 2000 - sum(expected)
    assert len(frequent) > 3
    assert stats.chisquare([*found, 2000 - sum(found)], [*expected, rest]).pvalue > TOO_UNLIKELY
