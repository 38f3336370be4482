"""Log-probabilities of sampled tokens: our engine's against the trainer's model, on one GPU.

`python -m benchmarks.gpu.agreement [--quick] [--fp4] [--size small|wide|tiny] [--cpu] [--out FILE]` prints JSON. The
model is random (4 layers, one of each kind), with `--fp4` under quantisation-aware training. The engine samples, with
continuous batching; the trainer scores all sequences in one packed pass. Then the optimiser steps, each published to
the engine, and sampled again. Long prompts are split over steps, begin with cached prefixes, and let the indexer
choose.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.engines import (
    Place,
    config_of,
    give,
    packed,
    random_model,
    random_prompts,
    start_engine,
    versions,
    with_engine_environment,
)
from posttrain import kernels
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.context import PackedContext
from rollouts.logprobs import sampler_logprobs
from rollouts.types import Sampling

SHOWN = 5
"""Differing tokens that a result names."""


@dataclass(frozen=True)
class Amounts:
    """How much is sampled and trained."""

    requests: int = 64
    tokens: int = 200
    long_prompts: tuple[int, ...] = (1300, 2500, 2700, 3100)
    shared: int = 1600
    """Tokens that two further long prompts have in common with the third."""
    steps: int = 20
    tokens_after_step: int = 64
    batched_tokens: int = 1024
    cache_bytes: int = 8 << 30
    max_model_len: int = 4096


QUICK = Amounts(requests=16, tokens=48, steps=2, tokens_after_step=32)
TINY = Amounts(6, 40, (150, 300, 330), 280, 2, 12, batched_tokens=64, cache_bytes=32 << 20, max_model_len=512)
"""For the CPU."""


@dataclass
class Sampled:
    """What the engine returned."""

    prompts: list[list[int]]
    answers: list[list[int]]
    logprobs_N: Tensor
    """Of all tokens of all answers."""


def sample(engine: Any, prompts: list[list[int]], tokens: int, temperature: float = 1.0, seed: int = 0) -> Sampled:
    """One answer of `tokens` tokens to each prompt."""
    groups = engine.generate(prompts, Sampling(max_tokens=tokens, temperature=temperature, seed=seed))
    answers = [group[0].token_ids for group in groups]
    reported = [logprob for group in groups for logprob in group[0].logprobs]
    return Sampled(prompts, answers, torch.tensor(reported, dtype=torch.float32))


def hidden_of_answers(model: DeepseekV4ForCausalLM, sampled: Sampled, device: str) -> tuple[Tensor, Tensor]:
    """Hidden states `[N, hidden]` that the answers' tokens were drawn from, and those tokens, in one packed pass."""
    sequences = [prompt + answer for prompt, answer in zip(sampled.prompts, sampled.answers, strict=True)]
    tokens_T, bounds = packed(sequences, device)
    hidden_TH = model.model.forward_packed(tokens_T, PackedContext(bounds))
    starts = bounds[:-1].tolist()
    spans = zip(starts, sampled.prompts, sampled.answers, strict=True)
    rows = [torch.arange(start + len(p) - 1, start + len(p) + len(a) - 1) for start, p, a in spans]
    rows_N = torch.cat(rows).to(device)
    return hidden_TH[rows_N], tokens_T[rows_N + 1]


def compare(model: DeepseekV4ForCausalLM, sampled: Sampled, device: str, temperature: float = 1.0) -> dict[str, Any]:
    """The trainer's log-probabilities minus the engine's: size, share of equal bits, where they differ first."""
    with torch.no_grad():
        hidden_NH, tokens_N = hidden_of_answers(model, sampled, device)
        trained_N = sampler_logprobs(model.lm_head(hidden_NH), tokens_N, temperature).cpu()
        unrounded_N, _ = kernels.linear_logprob(hidden_NH, model.lm_head.weight, tokens_N, temperature)
    difference_N = (trained_N - sampled.logprobs_N).double()
    owners = [(row, place) for row, answer in enumerate(sampled.answers) for place in range(len(answer))]
    different = difference_N.nonzero().squeeze(1).tolist()
    return {
        "tokens": len(owners),
        "largest": difference_N.abs().max().item(),
        "mean": difference_N.abs().mean().item(),
        "equal": 1 - len(different) / len(owners),
        "k3": (difference_N.exp() - 1 - difference_N).mean().item(),
        "largest_to_linear_logprob": (unrounded_N.cpu() - sampled.logprobs_N).abs().max().item(),
        "finite": bool(torch.isfinite(difference_N).all()),
        "first_different": [
            {
                "request": owners[n][0],
                "position": len(sampled.prompts[owners[n][0]]) + owners[n][1],
                "difference": difference_N[n].item(),
            }
            for n in different[:SHOWN]
        ],
    }


def cached_tokens(engine: Any, prompts: list[list[int]]) -> list[int]:
    """Prompt tokens that the engine takes from its prefix cache."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = engine._llm.generate(requests, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    return [output.num_cached_tokens or 0 for output in outputs]


class Trial:
    """An engine and a trainer with the same random weights."""

    def __init__(self, size: str, place: Place, amounts: Amounts, directory: Path, fp4: bool) -> None:
        self.place, self.amounts = place, amounts
        self.config = config_of(size, fp4)
        self.model = random_model(self.config, place)
        self.began = time.monotonic()
        self.engine = start_engine(
            self.config,
            directory,
            place,
            max_model_len=amounts.max_model_len,
            max_num_seqs=max(amounts.requests, 64),
            max_num_batched_tokens=amounts.batched_tokens,
            kv_cache_bytes=amounts.cache_bytes,
        )
        self.version = 0
        self.publish()
        self.report("engine ready")

    def report(self, *values: object) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self.began:7.1f} s", *values, file=sys.stderr, flush=True)

    def publish(self) -> None:
        """The trainer's weights to the engine."""
        self.version += 1
        self.engine.load_weights(self.model.engine_state_dict(), self.version)

    def short_prompts(self, seed: int) -> list[list[int]]:
        """Of 1 to 40 tokens."""
        lengths = [1 + 7 * row % 40 for row in range(self.amounts.requests)]
        return random_prompts(lengths, self.config.vocab_size, seed)

    def check(self, prompts: list[list[int]], tokens: int, temperature: float = 1.0, seed: int = 0) -> dict[str, Any]:
        """Sample and compare."""
        began = time.monotonic()
        sampled = sample(self.engine, prompts, tokens, temperature, seed)
        seconds = time.monotonic() - began
        result = compare(self.model, sampled, self.place.device, temperature)
        self.report(f"{result['tokens']} tokens, largest {result['largest']:.3g}, equal {result['equal']:.4f}")
        return result | {"sampling_seconds": seconds}

    def long(self) -> dict[str, Any]:
        """Chunked prefill, then the same prompts and more out of the prefix cache, then prefill alone."""
        amounts, vocabulary = self.amounts, self.config.vocab_size
        prompts = random_prompts(list(amounts.long_prompts), vocabulary, 11)
        tails = random_prompts([33, 90], vocabulary, 12)
        prompts += [prompts[-1][: amounts.shared] + tail for tail in tails]
        first = sample(self.engine, prompts, amounts.tokens_after_step, seed=3)
        results: dict[str, Any] = {"chunked": compare(self.model, first, self.place.device)}
        results["cached_tokens"] = cached_tokens(self.engine, prompts)
        again = sample(self.engine, prompts, amounts.tokens_after_step, seed=3)
        results["cached"] = compare(self.model, again, self.place.device)
        results["cached"]["same_answers"] = first.answers == again.answers
        scored = torch.tensor(list(chain(*self.engine.score(prompts, first.answers))))
        results["decode_against_prefill"] = (scored - first.logprobs_N).abs().max().item()
        self.report(
            "long prompts", {key: value["largest"] for key, value in results.items() if isinstance(value, dict)}
        )
        return results

    def updates(self) -> dict[str, Any]:
        """Optimiser steps on what the engine sampled, each one published and sampled again."""
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        amounts, after = self.amounts, []
        sampled = sample(self.engine, self.short_prompts(100), amounts.tokens_after_step, seed=100)
        stale: dict[str, Any] = {}
        for step in range(amounts.steps):
            hidden_NH, tokens_N = hidden_of_answers(self.model, sampled, self.place.device)
            logprobs_N, _ = kernels.linear_logprob(hidden_NH, self.model.lm_head.weight, tokens_N)
            advantages_N = torch.randn(len(tokens_N), generator=torch.Generator().manual_seed(step))
            loss = -(logprobs_N * advantages_N.to(self.place.device)).mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if step == 0:
                stale = compare(self.model, sampled, self.place.device)
            self.publish()
            sampled = sample(self.engine, self.short_prompts(101 + step), amounts.tokens_after_step, seed=101 + step)
            result = compare(self.model, sampled, self.place.device)
            self.report(f"step {step + 1}: largest {result['largest']:.3g}, equal {result['equal']:.4f}")
            after.append(result)
        return {
            "steps": amounts.steps,
            "largest": max(result["largest"] for result in after),
            "equal": min(result["equal"] for result in after),
            "mean": sum(result["mean"] for result in after) / len(after),
            "each": after,
            "largest_without_publishing": stale["largest"],
        }


def measure(size: str, place: Place, amounts: Amounts, fp4: bool) -> dict[str, Any]:
    """Everything, as a tree of numbers."""
    with tempfile.TemporaryDirectory() as directory:
        trial = Trial(size, place, amounts, Path(directory), fp4)
        results: dict[str, Any] = {"versions": versions(), "size": size, "dtype": str(place.dtype)}
        results["fp4_experts"] = fp4
        results["before"] = trial.check(trial.short_prompts(1), amounts.tokens)
        results["temperature 0.7"] = trial.check(trial.short_prompts(2), amounts.tokens_after_step, 0.7, seed=1)
        results["long"] = trial.long()
        results["updates"] = trial.updates()
        return results


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--size", choices=["small", "wide", "tiny"], default="small")
    parser.add_argument("--fp4", action="store_true", help="routed experts in MXFP4")
    parser.add_argument("--cpu", action="store_true", help="fp32 on the CPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    place = Place("cpu", torch.float32) if options.cpu else Place()
    amounts = TINY if options.size == "tiny" else QUICK if options.quick else Amounts()
    give(measure(options.size, place, amounts, options.fp4), options.out)


if __name__ == "__main__":
    with_engine_environment()
    main(sys.argv[1:])
