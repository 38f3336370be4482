"""How much of each domain a student gets: shares that follow the divergences, weights that even them out, alarms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from posttrain.errors import RunFailed
from posttrain.recipe.stages import OpdStage
from posttrain.recipe.student import GuardsConfig
from posttrain.trainers.generation import derive_seed
from posttrain.trainers.jobs import Prompt
from posttrain.trainers.progress import Progress
from posttrain.trainers.settings import endless

KEPT = 0.9
"""Weight of the past in a running mean."""
LARGEST_FACTOR = 4.0
"""By which adaptive shares differ from the recipe's, and `normalise_kl` changes a weight, at most."""
STARVED_STEPS = 20
"""Steps without a token of a domain after which there is a warning (more, where its share makes it rare)."""


class Mixing:
    """The running divergence of each domain and what follows from it; `shares` and `factor` change with `learned`."""

    def __init__(self, config: OpdStage, domains: Sequence[str], progress: Progress) -> None:
        self.config = config
        self.domains = sorted(domains)
        self.progress = progress
        self._running: dict[str, float] = {}
        self._hungry = dict.fromkeys(self.domains, 0)
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """For a snapshot."""
        return {"running": dict(self._running), "hungry": dict(self._hungry), "warned": sorted(self._warned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        self._running, self._hungry, self._warned = state["running"], state["hungry"], set(state["warned"])

    def shares(self) -> dict[str, float]:
        """What each domain is to get of the samples that are asked for next; relative to each other."""
        base = {domain: self.config.shares.get(domain, 1.0) for domain in self.domains}
        power = self.config.adaptive_shares
        return {domain: share * self._far(domain) ** power for domain, share in base.items()} if power else base

    def factor(self, domain: str) -> float:
        """By which the domain's weight is multiplied in this step."""
        return 1 / self._far(domain) if self.config.normalise_kl else 1.0

    def learned(self, divergences: Mapping[str, float]) -> None:
        """Note the mean divergence of every domain of which something was learned in this step."""
        for domain, value in divergences.items():
            before = self._running.get(domain, value)
            self._running[domain] = KEPT * before + (1 - KEPT) * value
        shares = self.shares()
        for domain in self.domains:
            self._hungry[domain] = 0 if domain in divergences else self._hungry[domain] + 1
            expected = self.config.batch_size * shares[domain] / sum(shares.values())
            if self._hungry[domain] >= max(STARVED_STEPS, math.ceil(5 / expected)) and domain not in self._warned:
                self._warned.add(domain)
                self.progress.warn(
                    f"{domain} starves: nothing was learned of it in {self._hungry[domain]} steps, in each of which "
                    f"{expected:.2g} samples of it were due"
                )

    def _far(self, domain: str) -> float:
        """The domain's running divergence over the mean of all, within bounds; 1 where there is none yet."""
        mean = sum(self._running.values()) / len(self._running) if self._running else 0.0
        if domain not in self._running or mean <= 0:
            return 1.0
        return min(max(self._running[domain] / mean, 1 / LARGEST_FACTOR), LARGEST_FACTOR)


class Guards:
    """Stops (or warns) when a domain's entropy or answer length stays out of bounds."""

    def __init__(self, config: GuardsConfig, stage: str, progress: Progress) -> None:
        self.config = config
        self.stage = stage
        self.progress = progress
        self._first_length: dict[str, float] = {}
        self._out: dict[tuple[str, str], int] = {}

    def state_dict(self) -> dict[str, Any]:
        """For a snapshot."""
        return {"first_length": dict(self._first_length), "out": dict(self._out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        self._first_length, self._out = state["first_length"], state["out"]

    def check(self, domain: str, entropy: float | None, length: float) -> None:
        """Look at one step of a domain: the student's mean entropy (None: nothing was learned) and mean length.

        Raises:
            RunFailed: out of bounds for long enough, and the action is to stop.
        """
        first = self._first_length.setdefault(domain, length)
        bound, ratio = self.config.min_entropy, self.config.length_ratio
        if bound is not None and entropy is not None:
            text = f"the entropy of {domain} is {entropy:.4g} nats, below guards.min_entropy, which is {bound:g}"
            self._count(domain, "entropy", entropy < bound, text)
        if ratio is not None:
            text = (
                f"answers of {domain} have {length:.4g} tokens in the mean, {first:.4g} in the first step: more than "
                f"guards.length_ratio, which is {ratio:g}, apart"
            )
            self._count(domain, "length", not first / ratio <= length <= first * ratio, text)

    def _count(self, domain: str, kind: str, out: bool, text: str) -> None:
        count = self._out[domain, kind] = self._out.get((domain, kind), 0) + 1 if out else 0
        if count != self.config.patience:
            return
        text = f"{text}, for {count} steps"
        if self.config.action == "stop":
            raise RunFailed(f"stage {self.stage}: {text} (stages.student.guards)")
        self.progress.warn(text)


class OrderedByTeacher:
    """`steps` batches of `batch_size` prompts, in each batch one domain after the other.

    Over the steps each domain's part approaches its share: what a batch cannot give a domain because samples are
    whole, the next ones make up for. A batch's shares (all domains', relative to each
    other) are those at the time when its first prompt is taken.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        shares: Callable[[], Mapping[str, float]],
        steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.shares = shares
        self.steps = steps
        self.batch_size = batch_size
        self._domains = sorted(prompts)
        self._supply = {domain: endless(prompts[domain], derive_seed(seed, domain)) for domain in self._domains}
        self._owed = dict.fromkeys(self._domains, 0.0)
        self._counts: list[dict[str, int]] = []
        """How many prompts of each domain the batches have that were begun."""

    def state_dict(self) -> dict[str, Any]:
        """For a snapshot."""
        return {"owed": dict(self._owed), "counts": [dict(count) for count in self._counts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned; the prompts come from the first one on again."""
        self._owed, self._counts = state["owed"], state["counts"]

    def __iter__(self) -> Iterator[Prompt]:
        for batch in range(self.steps):
            if batch == len(self._counts):
                self._counts.append(self._next_counts())
            for domain, count in self._counts[batch].items():
                yield from islice(self._supply[domain], count)

    def _next_counts(self) -> dict[str, int]:
        now = self.shares()
        total = sum(now[domain] for domain in self._domains)
        owed = self._owed
        for domain in self._domains:
            owed[domain] += self.batch_size * now[domain] / total
        count = {domain: max(0, int(owed[domain])) for domain in self._domains}
        for _ in range(self.batch_size - sum(count.values())):
            count[max(self._domains, key=lambda domain: (owed[domain] - count[domain], domain))] += 1
        for domain in self._domains:
            owed[domain] -= count[domain]
        return count
