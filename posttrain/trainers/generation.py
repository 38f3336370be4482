"""On-policy samples from the rollout service: what is asked for and when, and what a batch is made of.

A stage asks for groups in the order of its prompts, at most `rollout.steps_ahead` batches beyond the one that it
learns from:

    sync                   publish, ask for a batch, wait for it
    async                  publish while requests run, keep the service busy, take whichever groups finish first
    async, deterministic   take groups in their order, publish when none is left, ask for the next batches
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import RunFailed
from posttrain.models.deepseek_v4.routing import UNKNOWN
from posttrain.recipe.schema import RolloutConfig
from posttrain.trainers.jobs import Prompt
from posttrain.trainers.mismatch import Ages, LogprobDifference
from posttrain.trainers.models import publishable_weights
from posttrain.trainers.progress import Progress
from rollouts.types import Completion, FinishedGroup, GroupRequest, Sampling, episode_means


class Client(Protocol):
    """The rollout service as a trainer sees it (`rollouts.pool.RolloutClient`)."""

    def weight_version(self) -> int | None:
        """The version that the engines serve; None before the first."""

    def publish(self, weights: Mapping[str, np.ndarray], version: int) -> float:
        """Give every engine these weights, of a higher version than before; return the seconds it took.

        When it returns, all of them serve the version. Requests that run go on under it.
        """

    def submit(self, groups: Sequence[GroupRequest]) -> None:
        """Ask for groups; blocks while the queue is full."""

    def collect(
        self, count: int, ids: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[FinishedGroup]:
        """Wait for `count` finished groups: whichever come first, or those of `ids` in their order."""

    def consume(self, ids: Sequence[str]) -> None:
        """These groups were learned from; should the stage start again, it will be given the same answers."""

    def acknowledge(self, ids: Sequence[str]) -> None:
        """These groups are consumed for good: their tokens need not be kept any longer."""

    def forget_under(self, prefix: str) -> None:
        """Nobody will ask again for groups whose ids begin so."""

    def cancel(self, ids: Sequence[str]) -> None:
        """These groups are not wanted any more."""


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**31) that depends on every part and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Ask:
    """A prompt to be answered in at most `max_tokens` tokens."""

    prompt: Prompt
    max_tokens: int


@dataclass
class Group:
    """The answers to one prompt."""

    number: int
    """Which of the stage's requests it is."""
    prompt: Prompt
    request: GroupRequest
    oldest_version: int
    """The version of the weights when it was asked for: none of its tokens may be older."""
    completions: list[Completion] = field(default_factory=list)
    failure: str | None = None
    ended: bool = False
    """It has its completions, or failed."""
    rewards: list[float] = field(default_factory=list)
    reward_parts: list[dict[str, float]] = field(default_factory=list)


def means_by_effort(groups: Sequence[Group], values: Sequence[float]) -> dict[str, float]:
    """The mean of `values`, one for each answer of the groups in order, in each mode; NaN does not count."""
    by_effort: dict[str, list[float]] = {}
    efforts = [group.prompt.effort for group in groups for _ in group.completions]
    for effort, value in zip(efforts, values, strict=True):
        if effort is not None and not math.isnan(value):
            by_effort.setdefault(effort, []).append(value)
    return {effort: fmean(found) for effort, found in by_effort.items()}


@dataclass
class RolloutGeneration:
    """Batches for a TRL trainer from the rollout service: what `trl_seam.inject_generation` takes.

    Request g of the stage samples with a seed derived from `seed` and the batch g // `prompts_per_step`, as number
    g % `prompts_per_step` in it, and has the id `<stage>/<batch>/<number>`: both are the same whenever it runs.
    """

    client: Client
    model: Callable[[], PreTrainedModel]
    """The model whose weights are published."""
    stage: str
    asks: Iterator[Ask]
    steps: int
    prompts_per_step: int
    temperature: float
    seed: int
    progress: Progress
    rollout: RolloutConfig
    group_size: int = 1
    first_version: int = 0
    informs: Callable[[Sequence[Group]], Sequence[bool]] | None = None
    """Judges finished groups: whether anything can be learned from each. Without it that is so of all."""
    domain_finished: Callable[[Sequence[Group]], None] | None = None
    """Is told of a domain's part of the next batch when the last of its groups is finished, while those of the domains
    behind it still run; not when updates are in flight, where a batch is whatever finishes first."""
    keep_routing: bool = False
    """Have the engines return the experts that tokens went to, for the trainer to use the same."""
    top_p: float = 1.0
    """Below 1 the engines return which tokens it left to be drawn, for the trainer to compare the same."""
    spare_groups: int = 0
    """How many groups of which nothing can be learned are replaced in each step."""
    mask_truncated: bool = False
    """Learn nothing from episodes that did not come to an answer."""
    steps_done: int = 0
    publish_seconds: list[float] = field(default_factory=list)
    waited_seconds: float = 0.0
    seconds: float = 0.0
    """From the first batch's being asked for to the end of the stage."""
    groups: list[Group] = field(default_factory=list)
    """The latest batch, in the order of the trainer's rows."""

    def __post_init__(self) -> None:
        self.ages = Ages(self.rollout.steps_ahead)
        self._pending: dict[str, Group] = {}
        self._asked = 0
        self._base: int | None = None
        self._published = -1
        self._began: float | None = None
        self._kept: list[tuple[int, str]] = []
        """Groups that are done with and that the log still has, with the step in which they were."""

    @property
    def samples(self) -> list[Completion]:
        """The answers of the latest batch, in the order of the trainer's rows."""
        return [completion for group in self.groups for completion in group.completions]

    @property
    def version(self) -> int:
        """The version of the weights that the latest batch trains."""
        assert self._base is not None
        return self._base + self.steps_done

    def draw(self) -> list[dict[str, Any]]:
        """The next batch: publish what is due, ask for more, wait for enough; returns the trainer's rows.

        Raises:
            RunFailed: samples of weights that no engine may serve any more, or none at all.
        """
        self._began = self._began or time.perf_counter()
        self._done_with_batch()
        if self._pending and self._base is None:
            self._ask_again()
        in_flight, ahead = self._in_flight, self.rollout.steps_ahead
        if in_flight:
            self._publish()
            self._ask(min(ahead + 1, self.steps - self.steps_done) * self.prompts_per_step - len(self._pending))
        groups = self._take()
        if not in_flight and ahead and not self._pending:
            self._ask(min(ahead, self.steps - self.steps_done - 1) * self.prompts_per_step)
        # One teacher after the other, and within one the order of the requests: free of who finished first.
        self.groups = sorted(groups, key=lambda group: (group.prompt.domain, group.number))
        self.steps_done += 1
        self._report()
        return [
            {"prompt": group.request.prompt_ids, "problem_id": group.prompt.problem_id, "domain": group.prompt.domain}
            for group in self.groups
            for _ in group.completions
        ]

    def sync_weights(self) -> None:
        """TRL's call before it samples; `draw` has published what there was to publish."""

    def generate(
        self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """TRL's call: hands out the batch that `draw` returned the rows of."""
        expected = [group.request.prompt_ids for group in self.groups for _ in group.completions]
        if prompts != expected:
            raise RunFailed("TRL asks for answers to other prompts than those of the batch that was drawn")
        completions = [sample.token_ids for sample in self.samples]
        logprobs = [[[value] for value in sample.logprobs] for sample in self.samples]
        return prompts, completions, logprobs, None

    def loss_masks(self) -> list[list[int]] | None:
        """For each token of each sample 1 if something is learned from it; None when that is so of all."""
        masks = self.ages.mask(self.samples, self.version)
        if all(sample.episode is None for sample in self.samples):
            return masks
        fresh = masks or [[1] * len(sample.token_ids) for sample in self.samples]
        return [
            [one * sampled * self._learns(sample) for one, sampled in zip(mask, sample.loss_mask, strict=True)]
            for mask, sample in zip(fresh, self.samples, strict=True)
        ]

    def _learns(self, sample: Completion) -> bool:
        """Whether anything is learned from an episode; TRL sees only whether its last token ends a turn."""
        return sample.finish_reason == "stop" or not self.mask_truncated

    def routes(self, rows: Sequence[int] | None, mask_BS: Tensor) -> Tensor | None:
        """Experts that samples of the latest batch went to in the engine; see `trl_seam.Generation`."""
        if not self.keep_routing:
            return None
        samples = self.samples
        kept = [samples[row].routes for row in (range(len(samples)) if rows is None else rows)]
        if any(routes_TLK is None for routes_TLK in kept):
            raise RunFailed(f"stage {self.stage}: keep_routing, but an answer came without its routes")
        known = [torch.from_numpy(routes_TLK.astype(np.int16)) for routes_TLK in kept if routes_TLK is not None]
        routes_BSLK = torch.full((*mask_BS.shape, *known[0].shape[1:]), UNKNOWN, dtype=torch.int16)
        for row, (routes_TLK, first) in enumerate(zip(known, mask_BS.int().argmax(dim=1).tolist(), strict=True)):
            routes_BSLK[row, first : first + len(routes_TLK)] = routes_TLK
        return routes_BSLK.to(mask_BS.device)

    def masks(self, rows: Sequence[int] | None) -> list[bytes] | None:
        """What could have been drawn at each token of samples of the latest batch; see `trl_seam.Generation`."""
        if self.top_p == 1:
            return None
        samples = self.samples
        chosen = samples if rows is None else [samples[row] for row in rows]
        return [mask for one in chosen for mask in one.masks or [b""] * len(one.token_ids)]

    def state_dict(self) -> dict[str, Any]:
        """For a snapshot, after an update.

        Where the same run has to give the same tokens, waits for all that was asked for, so that the log has it: the
        weights that it comes from will not come by again.
        """
        if not self._in_flight:
            self._fetch(list(self._pending))
        return {
            "steps_done": self.steps_done,
            "asked": self._asked,
            "pending": {group.number: group.oldest_version for group in self._pending.values()},
            "kept": list(self._kept),
            "ages": self.ages.state_dict(),
            "publish_seconds": list(self.publish_seconds),
            "waited_seconds": self.waited_seconds,
            "seconds": time.perf_counter() - self._began if self._began is not None else 0.0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned: goes on with the next prompts; what was asked for is asked for again."""
        for number in range(state["asked"]):
            ask = next(self.asks)
            if number in state["pending"]:
                group = self._group(number, ask, state["pending"][number])
                self._pending[group.request.id] = group
        self._asked, self.steps_done, self._kept = state["asked"], state["steps_done"], state["kept"]
        self.ages.load_state_dict(state["ages"])
        self.publish_seconds, self.waited_seconds = state["publish_seconds"], state["waited_seconds"]
        self._began = time.perf_counter() - state["seconds"]

    def finish(self) -> None:
        """The stage is over: nothing that was asked for is needed any more."""
        self._done_with_batch()
        if self._pending:
            self.client.cancel(list(self._pending))
            self._pending.clear()
        if self._began is not None:
            self.seconds = time.perf_counter() - self._began

    @property
    def _in_flight(self) -> bool:
        """Whether weights are published while requests run."""
        return self.rollout.mode == "async" and not self.rollout.deterministic

    def _done_with_batch(self) -> None:
        """The latest batch was learned from."""
        if self.groups:
            self._consumed([group.request.id for group in self.groups], self.steps_done)

    def _consumed(self, ids: list[str], step: int) -> None:
        """Groups are done with, in this step. Where what is sampled depends on timing, nobody could use them again."""
        if self._in_flight:
            self.client.acknowledge(ids)
        else:
            self.client.consume(ids)
            self._kept += [(step, group_id) for group_id in ids]

    def snapshots_begin(self, step: int) -> None:
        """No life of the stage begins before the end of `step` again: the log may forget what was used until then."""
        if gone := [group_id for used, group_id in self._kept if used <= step]:
            self.client.acknowledge(gone)
            self._kept = [(used, group_id) for used, group_id in self._kept if used > step]

    def _publish(self) -> None:
        """Publish the current weights, unless that was done in this step."""
        if self._published == self.steps_done:
            return
        started = time.perf_counter()
        if self._base is None:  # another stage may have published to the same engines before
            self._base = max((self.client.weight_version() or 0) - self.steps_done, self.first_version)
            if self._in_flight or self._base != self.first_version:
                # What an earlier life of the stage left comes from other weights than these versions will be.
                self.client.forget_under(f"{self.stage}/")
        with self.progress.phase("publishing"):
            weights = publishable_weights(self.model())
            self.publish_seconds.append(self.client.publish(weights, self._base + self.steps_done + 1))
        self._published = self.steps_done
        self.progress.add("seconds_publish", time.perf_counter() - started)

    def _ask(self, count: int) -> None:
        """Submit the next `count` groups, or as many as there are; on idle engines only after an update."""
        if count <= 0:
            return
        if not self._pending:
            self._publish()
        assert self._base is not None
        groups = []
        for _, ask in zip(range(count), self.asks, strict=False):
            groups.append(self._group(self._asked, ask, self._base + self._published + 1))
            self._asked += 1
        self._pending |= {group.request.id: group for group in groups}
        with self.progress.phase("sampling"):
            self.client.submit([group.request for group in groups])

    def _group(self, number: int, ask: Ask, oldest_version: int) -> Group:
        """Request `number` of the stage."""
        batch, row = divmod(number, self.prompts_per_step)
        sampling = Sampling(
            max_tokens=ask.max_tokens,
            temperature=self.temperature,
            n=self.group_size,
            seed=derive_seed(self.seed, "batch", batch),
            routes=self.keep_routing,
            top_p=self.top_p,
            masks=self.top_p < 1,
        )
        name, tokens = f"{self.stage}/{batch}/{row}", list(ask.prompt.token_ids)
        request = GroupRequest(
            name, tokens, sampling, index=row, domain=ask.prompt.domain, problem_id=ask.prompt.problem_id
        )
        return Group(number, ask.prompt, request, oldest_version)

    def _ask_again(self) -> None:
        """After a restart: for what had been asked for when the snapshot was written."""
        self._publish()
        self.client.submit([group.request for group in self._pending.values()])
        if self._in_flight:
            return
        self._fetch(list(self._pending))
        lost = [
            group.request.id
            for group in self._pending.values()
            if any(sample.weight_version > group.oldest_version for sample in group.completions)
        ]
        if lost:
            self.progress.warn(
                f"{len(lost)} groups were sampled anew after the restart, from newer weights than before: the log does "
                f"not have all of them ({lost[0]}); the stage does not end with the bits of an undisturbed one"
            )

    def _take(self) -> list[Group]:
        """Wait for one step's groups; those that teach nothing are replaced as long as there are spare ones."""
        taken: list[Group] = []
        spare, given_up, replaced, waited = self.spare_groups, 0, 0, self.waited_seconds
        reason = "there are no more prompts"
        while (missing := self.prompts_per_step - len(taken) - given_up) > 0:
            self._ask(missing - len(self._pending))
            if not self._pending:
                break
            groups = self._receive(min(missing, len(self._pending)))
            good = iter(self._judge([group for group in groups if group.failure is None]))
            for group in groups:
                if (group.failure is not None or not next(good)) and spare > 0:
                    spare, replaced = spare - 1, replaced + 1
                    self._consumed([group.request.id], self.steps_done + 1)
                elif group.failure is not None:
                    given_up, reason = given_up + 1, group.failure
                else:
                    taken.append(group)
        self.progress.add("seconds_generate", self.waited_seconds - waited)
        if self.spare_groups:
            self.progress.add("groups_replaced", replaced)
        if given_up:
            self.progress.add("groups_given_up", given_up)
        if not taken:
            raise RunFailed(
                f"stage {self.stage}: none of the groups of step {self.steps_done + 1} could be sampled ({reason})"
            )
        return taken

    def _judge(self, groups: list[Group]) -> Sequence[bool]:
        return self.informs(groups) if self.informs is not None and groups else [True] * len(groups)

    def _receive(self, count: int) -> list[Group]:
        """Wait for `count` of the groups that were asked for: any when updates are in flight, else the oldest."""
        if self.domain_finished is None or self._in_flight:
            return self._collect(count)
        groups: list[Group] = []
        asked = [group.prompt.domain for group in self._pending.values()][:count]
        for _, members in groupby(asked):
            found = self._collect(len(list(members)))
            groups += found
            if whole := [group for group in found if group.failure is None]:
                self.domain_finished(whole)
        return groups

    def _collect(self, count: int) -> list[Group]:
        """As `_receive`, all at once."""
        started = time.perf_counter()
        ids = self._fetch(list(self._pending)[:count]) if not self._in_flight else self._take_in(count)
        self.waited_seconds += time.perf_counter() - started
        if len(ids) != count:
            raise RunFailed(f"the rollout service returned {len(ids)} groups; {count} were asked for")
        return [self._pending.pop(group_id) for group_id in ids]

    def _fetch(self, ids: list[str]) -> list[str]:
        """Wait for these groups, where they are not here yet; returns those that came."""
        missing = [one for one in ids if not self._pending[one].ended]
        if missing:
            self._take_in(len(missing), missing)
        return [one for one in ids if self._pending[one].ended]

    def _take_in(self, count: int, ids: list[str] | None = None) -> list[str]:
        """Collect groups and note what came of them; returns their ids."""
        with self.progress.phase("sampling"):
            finished = self.client.collect(count, ids)
        for one in finished:
            group = self._pending[one.request.id]
            group.completions, group.failure, group.ended = one.completions, one.failure, True
            if group.failure is None:
                self._check(group)
        return [one.request.id for one in finished]

    def _check(self, group: Group) -> None:
        if len(group.completions) != self.group_size:
            raise RunFailed(
                f"group {group.request.id} has {len(group.completions)} samples; {self.group_size} were asked for"
            )
        for index, sample in enumerate(group.completions):
            tokens, logprobs = len(sample.token_ids), len(sample.logprobs)
            where = f"sample {index} of group {group.request.id}"
            if not tokens or tokens != logprobs:
                raise RunFailed(
                    f"{where} has {tokens} tokens and {logprobs} log-probabilities; there must be at least one token, "
                    "and as many of both"
                )
            # With updates in flight, tokens from before a restart may be older: by their age they are masked.
            if sample.oldest_version < group.oldest_version and not self._in_flight:
                raise RunFailed(
                    f"{where} comes from weight version {sample.oldest_version}; when it was asked for, the trainer "
                    f"had published {group.oldest_version}: an engine serves stale weights"
                )

    def _report(self) -> None:
        samples = self.samples
        lengths = [len(sample.sampled_ids) for sample in samples]
        truncated = [sample.finish_reason != "stop" for sample in samples]
        self.progress.add("completion_length", sum(lengths) / len(lengths))
        self.progress.add("truncated", sum(truncated) / len(truncated))
        for effort, mean in means_by_effort(self.groups, lengths).items():
            self.progress.add(f"effort/{effort}/length", mean)
        self.progress.add_tokens(sum(lengths))
        for name, value in episode_means(samples).items():
            self.progress.add(name, value)
        metrics = self.ages.add(samples, self.version)
        if self.rollout.mode == "async":
            for name, value in metrics.items():
                self.progress.add(name, value)


@dataclass(frozen=True)
class Sampled:
    """What is to be known of a stage's sampling when it is over."""

    difference: LogprobDifference
    publish_seconds: list[float]
    off_policy: dict[str, float]
    waited_seconds: float
    seconds: float
    """In which samples were asked for and learned from."""

    @classmethod
    def of(cls, generation: RolloutGeneration, difference: LogprobDifference) -> Sampled:
        """The totals of `generation`."""
        return cls(
            difference,
            generation.publish_seconds,
            generation.ages.summary(),
            generation.waited_seconds,
            generation.seconds,
        )
