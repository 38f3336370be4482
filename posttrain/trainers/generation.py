"""On-policy samples from the rollout service, and how far the sampler's log-probabilities are from the trainer's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import RunFailed
from posttrain.trainers.models import publishable_weights
from posttrain.trainers.progress import Progress
from rollouts.types import Completion, Sampling


class Client(Protocol):
    """The rollout service as a trainer sees it (`rollouts.pool.RolloutClient`)."""

    def weight_version(self) -> int | None:
        """The version that the engines serve; None before the first."""

    def publish(self, weights: Mapping[str, np.ndarray], version: int) -> float:
        """Give every engine these weights, of a higher version than before; return the seconds it took.

        When it returns, all of them serve the version.
        """

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in order."""


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**31) that depends on every part and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


LARGEST_MEAN_DIFFERENCE = 0.5
"""Nats, mean over a batch. Rounding (even FP8 against bf16: 0.2) stays below; wrong weights, tokens or rows do not."""


@dataclass
class LogprobDifference:
    """Trainer minus sampler, over all the tokens seen so far."""

    largest: float = 0.0
    tokens: int = 0
    k3_sum: float = 0.0

    @property
    def k3(self) -> float:
        """KL(sampler || trainer), estimated as the mean of exp(d) - 1 - d (always >= 0)."""
        return self.k3_sum / max(1, self.tokens)

    def add(self, trainer_N: Tensor, sampler_N: Tensor) -> dict[str, float]:
        """Take in the log-probabilities of N sampled tokens; return the metrics of these N alone.

        Raises:
            RunFailed: sampler and trainer do not look at the same model or the same tokens.
        """
        if trainer_N.numel() == 0:
            return {}
        difference_N = trainer_N.detach().double() - sampler_N.double()
        k3_N = torch.expm1(difference_N) - difference_N
        largest, mean = difference_N.abs().max().item(), difference_N.abs().mean().item()
        if not mean <= LARGEST_MEAN_DIFFERENCE:
            raise RunFailed(
                f"the sampler's log-probabilities are {mean:.3g} nats from the trainer's on average (at most "
                f"{largest:.3g}): the engines do not run the trainer's weights, or samples were mixed up"
            )
        self.largest = max(self.largest, largest)
        self.tokens += difference_N.numel()
        self.k3_sum += k3_N.sum().item()
        return {
            "logprob_diff_max": largest,
            "logprob_diff_mean": mean,
            "logprob_k3": k3_N.mean().item(),
        }


@dataclass
class RolloutGeneration:
    """Samples for a TRL trainer from the rollout service: what `trl_seam.inject_generation` takes.

    `model` returns the model whose weights are published before each batch that follows an update. Every call
    of `generate` has a sampling seed of its own, derived from `seed` and the number of the batch.
    """

    client: Client
    model: Callable[[], PreTrainedModel]
    sampling: Sampling
    """`n` and `seed` in it are ignored."""
    seed: int
    progress: Progress
    limits: Callable[[], Sequence[int]] | None = None
    """Token limits of the single samples of the coming batch, where they are lower than `sampling.max_tokens`."""
    version: int | None = None
    batches: int = 0
    publish_seconds: list[float] = field(default_factory=list)
    samples: list[Completion] = field(default_factory=list)
    """The latest batch, in the order of the trainer's rows."""

    def sync_weights(self) -> None:
        """Publish the current weights as the next version."""
        started = time.perf_counter()
        if self.version is None:  # another stage may have published to the same engines before
            self.version = self.client.weight_version() or 0
        self.version += 1
        seconds = self.client.publish(publishable_weights(self.model()), self.version)
        self.publish_seconds.append(seconds)
        self.progress.add("seconds_publish", time.perf_counter() - started)

    def generate(
        self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """TRL's call: `prompts` repeats each prompt `num_generations` times in a row."""
        started = time.perf_counter()
        seed = derive_seed(self.seed, "batch", self.batches)
        sampling = replace(self.sampling, n=num_generations, seed=seed)
        groups = self.client.generate(prompts[::num_generations], sampling)
        self.samples = [completion for group in groups for completion in group]
        if self.limits is not None:
            self.samples = [cut(sample, limit) for sample, limit in zip(self.samples, self.limits(), strict=True)]
        self._check(len(prompts))
        self.batches += 1
        self.progress.add("seconds_generate", time.perf_counter() - started)
        self._report()
        completions = [sample.token_ids for sample in self.samples]
        logprobs = [[[value] for value in sample.logprobs] for sample in self.samples]
        return prompts, completions, logprobs, None

    def sampler_logps(self) -> Tensor:
        """The sampler's log-probabilities of all tokens of the latest batch, one sample after the other. Shape [N]."""
        return torch.tensor([value for sample in self.samples for value in sample.logprobs], dtype=torch.float64)

    def _check(self, expected: int) -> None:
        if len(self.samples) != expected:
            raise RunFailed(f"the rollout service returned {len(self.samples)} samples; {expected} were asked for")
        for index, sample in enumerate(self.samples):
            if not sample.token_ids or len(sample.token_ids) != len(sample.logprobs):
                raise RunFailed(
                    f"sample {index} of weight version {self.version} has {len(sample.token_ids)} tokens and "
                    f"{len(sample.logprobs)} log-probabilities; there must be at least one token, and as many of both"
                )
            if sample.weight_version != self.version:
                raise RunFailed(
                    f"sample {index} comes from weight version {sample.weight_version}; the trainer published "
                    f"{self.version}, so an engine serves stale weights"
                )

    def _report(self) -> None:
        lengths = [len(sample.token_ids) for sample in self.samples]
        truncated = [sample.finish_reason == "length" for sample in self.samples]
        self.progress.add("completion_length", sum(lengths) / len(lengths))
        self.progress.add("truncated", sum(truncated) / len(truncated))
        self.progress.add_tokens(sum(lengths))


def cut(completion: Completion, limit: int) -> Completion:
    """The completion as it would have been with a limit of `limit` tokens: sampling does not look ahead."""
    if len(completion.token_ids) <= limit:
        return completion
    return replace(
        completion,
        token_ids=completion.token_ids[:limit],
        logprobs=completion.logprobs[:limit],
        finish_reason="length",
    )
