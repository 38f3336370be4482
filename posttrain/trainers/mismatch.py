"""How far sampler and trainer are apart: by rounding on tokens of the same weights, by age on tokens of older ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import RunFailed
from posttrain.recipe.stages import ImportanceConfig
from rollouts.types import Completion

LARGEST_MEAN_DIFFERENCE = 0.5
"""Nats, mean over a batch. Rounding (even FP8 against bf16: 0.2) stays below; wrong weights, tokens or rows do not."""


@dataclass
class LogprobDifference:
    """Trainer minus sampler, over all the tokens seen so far that both computed from the same weights."""

    largest: float = 0.0
    tokens: int = 0
    k3_sum: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """For a snapshot."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        vars(self).update(state)

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


def importance_ratios(
    trainer_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor, config: ImportanceConfig
) -> tuple[Tensor, Tensor]:
    """Ratio of the trainer's to the sampler's probability before bounds, and where the bounds of `config` change it.

    Level `sequence`: the product over the sample's tokens that `mask_BT` (0 or 1) keeps. Both results have shape
    [B, T], and mean something where the mask is 1. The same numbers that TRL multiplies the loss with; it reports
    them only after the bounds.
    """
    difference_BT = (trainer_BT.double() - sampler_BT.double()) * mask_BT
    if config.level == "sequence":
        difference_BT = difference_BT.sum(dim=1, keepdim=True).expand_as(difference_BT)
    ratio_BT = difference_BT.exp()
    outside_BT = torch.zeros_like(ratio_BT, dtype=torch.bool)
    if config.max is not None:
        outside_BT = outside_BT | (ratio_BT > config.max)
    if config.min is not None:
        outside_BT = outside_BT | (ratio_BT < config.min)
    return ratio_BT, outside_BT


MANY_SPANS = 4
"""Samples of this many version spans or more are counted together."""


@dataclass
class Ages:
    """How old the weights were that sampled the tokens of a stage, in steps of the stage.

    A token's age is the version that is trained minus the version that sampled it. Tokens older than `limit` are
    masked: they are context for the others, and nothing is learned from them. An environment's tokens do not count.
    """

    limit: int
    tokens: Counter[int] = field(default_factory=Counter)
    """By age."""
    tokens_by_spans: Counter[int] = field(default_factory=Counter)
    """By the number of version spans of the sample that they are in."""
    ratio_sum: float = 0.0
    ratio_tokens: int = 0
    bounded_tokens: int = 0

    def state_dict(self) -> dict[str, Any]:
        """For a snapshot."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        vars(self).update({name: Counter(value) if isinstance(value, dict) else value for name, value in state.items()})

    def add(self, samples: Sequence[Completion], version: int) -> dict[str, float]:
        """Take in a batch that is trained at `version`; return the metrics of this batch alone."""
        ages: Counter[int] = Counter()
        spans: Counter[int] = Counter()
        for sample in samples:
            if sample.episode is None:
                for span in sample.spans:
                    ages[version - span.version] += span.end - span.begin
            else:
                ages.update(version - one for one, own in zip(sample.versions, sample.loss_mask, strict=True) if own)
            spans[min(len(sample.spans), MANY_SPANS)] += len(sample.sampled_ids)
        self.tokens += ages
        self.tokens_by_spans += spans
        return self._metrics(ages, spans)

    def add_ratios(self, ratio_N: Tensor, outside_N: Tensor) -> dict[str, float]:
        """Take in the importance ratios of N tokens that are learned from; return the metrics of these N alone."""
        if ratio_N.numel() == 0:
            return {}
        self.ratio_sum += ratio_N.sum().item()
        self.ratio_tokens += ratio_N.numel()
        self.bounded_tokens += int(outside_N.sum())
        return {
            "importance_ratio_raw": ratio_N.mean().item(),
            "importance_bounded": outside_N.double().mean().item(),
        }

    def mask(self, samples: Sequence[Completion], version: int) -> list[list[int]] | None:
        """For each token of each sample 1 if something is learned from it; None when that is so of all."""
        if all(version - sample.oldest_version <= self.limit for sample in samples):
            return None
        return [[int(version - one <= self.limit) for one in sample.versions] for sample in samples]

    def summary(self) -> dict[str, float]:
        """The metrics over the whole stage."""
        metrics = self._metrics(self.tokens, self.tokens_by_spans)
        if self.ratio_tokens:
            metrics["importance_ratio_raw"] = self.ratio_sum / self.ratio_tokens
            metrics["importance_bounded"] = self.bounded_tokens / self.ratio_tokens
        return metrics

    def _metrics(self, ages: Counter[int], spans: Counter[int]) -> dict[str, float]:
        total = ages.total()
        if not total:
            return {}
        over = sum(count for age, count in ages.items() if age > self.limit)
        return {
            "staleness_mean": sum(age * count for age, count in ages.items()) / total,
            "staleness_max": max(age for age, count in ages.items() if count),
            "staleness_masked": over / total,
            **{f"staleness/{age}": count / total for age, count in sorted(ages.items()) if count},
            **{f"version_spans/{number}": count / total for number, count in sorted(spans.items())},
        }
