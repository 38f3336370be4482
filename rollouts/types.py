"""What goes into the rollout service and what comes out: tokens first, text never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

UNNAMED = "unnamed/"
"""Begins the ids of groups that nobody can ask for again after the driver's death."""
FAILED = "failed: "
"""Begins the finish reason of an episode whose environment raised; then comes what it raised."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. `seed` makes every request reproducible: sample j of prompt i uses a stream of its own."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    """Completions for each prompt."""
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's own end tokens."""
    routes: bool = False
    """Return the experts that each token went to (`Completion.routes`); prompts are then read without the cache."""
    masks: bool = False
    """Return which tokens `top_p` left to be drawn (`Completion.masks`)."""


def sample_name(group_id: str, sample: int) -> str:
    """The id of one sample of a group."""
    return f"{group_id}#{sample}"


@dataclass(frozen=True)
class GroupRequest:
    """A prompt of which `sampling.n` completions are wanted.

    Sample j is request `f"{id}#{j}"`. Its token at position p depends on the weights, the tokens before it, and on
    (`sampling.seed`, `index`, j, p); never on the engine, on what else is sampled, or on a restart in between.
    """

    id: str
    """Unique in a run and the same after a restart, as "expert/letters/grpo/12/3": what was logged belongs to it."""
    prompt_ids: list[int]
    sampling: Sampling
    index: int = 0
    """Tells the prompts of a batch apart in their random numbers."""
    domain: str = ""
    """For caps on how much of a domain is sampled at once, and for estimates of lengths."""
    session: str = ""
    """Requests of one session, as the turns of a conversation, go to the worker that has the earlier ones cached."""
    problem_id: str = ""
    """What the prompt asks; `rollouts.environments.EpisodeClient` finds the environment by it."""

    def sample_id(self, sample: int) -> str:
        """The request of one sample."""
        return sample_name(self.id, sample)


@dataclass(frozen=True)
class SampleRequest:
    """One sample of a group as an engine takes it: from the start, or from where another engine left it."""

    id: str
    prompt_ids: list[int]
    token_ids: list[int]
    """Sampled already; the next token is sampled after these."""
    sampling: Sampling
    seed: int
    """`rollouts.engine.request_seed` of its group and number."""
    attempt: int = 0
    """How many engines had it before."""


@dataclass
class NewTokens:
    """What one step of an engine added to a sample."""

    id: str
    position: int
    """Of the first of them in the completion."""
    token_ids: list[int]
    logprobs: list[float]
    version: int
    finish_reason: str | None = None
    """`stop` or `length` with the last tokens of the sample."""
    routes: bytes = field(default=b"", repr=False)
    """Experts of what was read for these tokens (`rollouts.routes`); empty unless asked for."""
    mask: bytes = field(default=b"", repr=False)
    """Which tokens could have been drawn (`rollouts.masks`); empty for all of them, and unless asked for."""


@dataclass(frozen=True)
class VersionSpan:
    """Tokens `begin` to `end` (not included) of a completion were sampled from weights of `version`."""

    begin: int
    end: int
    version: int


@dataclass(frozen=True)
class EpisodeFacts:
    """What tells a conversation from a single answer."""

    loss_mask: list[int]
    """For each token of the completion: 1 if the model sampled it, 0 if the environment wrote it."""
    turns: int
    """Of the model."""
    tool_calls: int
    tool_errors: int
    """Calls that could not be read or carried out; they are among the calls."""
    reward: float = 0.0
    """The environment's own."""


@dataclass
class Completion:
    """One sampled answer. `logprobs` are the sampler's own, of what it sampled from (temperature applied)."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    """`stop` (an end-of-sequence token, which is the last token) or `length`."""
    spans: tuple[VersionSpan, ...]
    """In order, without gaps, over all tokens. Never empty: without tokens it is one span from 0 to 0."""
    routes: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Experts `[prompt + completion - 1, layers, k]`, as they were when each token was read; only if asked for."""
    episode: EpisodeFacts | None = None
    """Of a whole conversation with an environment. `finish_reason` may then also be `turn_limit`, or `failed: ...`."""
    masks: tuple[bytes, ...] | None = field(default=None, repr=False, compare=False)
    """For each token which ones could have been drawn, encoded by `rollouts.masks`; None when that is so of all."""

    @classmethod
    def of_version(cls, token_ids: list[int], logprobs: list[float], finish_reason: str, version: int) -> Completion:
        """A completion that one version of the weights sampled from its first token to its last."""
        return cls(token_ids, logprobs, finish_reason, (VersionSpan(0, len(token_ids), version),))

    @property
    def weight_version(self) -> int:
        """The newest version that sampled a token of it."""
        return max(span.version for span in self.spans)

    @property
    def oldest_version(self) -> int:
        """The oldest version that sampled a token of it."""
        return min(span.version for span in self.spans)

    @property
    def versions(self) -> list[int]:
        """The version of each token."""
        return [span.version for span in self.spans for _ in range(span.begin, span.end)]

    @property
    def loss_mask(self) -> list[int]:
        """For each token 1 if the model sampled it: all, except an environment's."""
        return [1] * len(self.token_ids) if self.episode is None else self.episode.loss_mask

    @property
    def sampled_ids(self) -> list[int]:
        """The tokens that the model sampled."""
        if self.episode is None:
            return self.token_ids
        return [token for token, sampled in zip(self.token_ids, self.loss_mask, strict=True) if sampled]

    def first(self, count: int) -> Completion:
        """Its first `count` tokens, as if that had been the limit: sampling does not look ahead."""
        if len(self.token_ids) <= count:
            return self
        kept = [span for span in self.spans if span.begin < max(1, count)]
        spans = tuple(replace(span, end=min(span.end, count)) for span in kept)
        return Completion(self.token_ids[:count], self.logprobs[:count], "length", spans)


def episode_means(completions: Sequence[Completion]) -> dict[str, float]:
    """Metrics of the episodes among completions, for each the mean over them; none if there are none."""
    facts = [one.episode for one in completions if one.episode is not None]
    if not facts:
        return {}
    return {
        "turns": sum(one.turns for one in facts) / len(facts),
        "tool_calls": sum(one.tool_calls for one in facts) / len(facts),
        "tool_errors": sum(one.tool_errors for one in facts) / len(facts),
        "environment_tokens": sum(one.loss_mask.count(0) for one in facts) / len(facts),
    }


def version_spans(versions: list[int]) -> tuple[VersionSpan, ...]:
    """The spans of a completion from the version of each of its tokens (at least one)."""
    begins = [0] + [at for at in range(1, len(versions)) if versions[at] != versions[at - 1]]
    return tuple(
        VersionSpan(begin, end, versions[begin])
        for begin, end in zip(begins, [*begins[1:], len(versions)], strict=True)
    )


@dataclass(frozen=True)
class FinishedGroup:
    """A group that is done: all its completions, in order of samples, or the reason why there are none."""

    request: GroupRequest
    completions: list[Completion]
    failure: str | None = None
    """Why it was given up (a request that ends every engine it comes to; cancelled); `completions` is empty then."""


@dataclass
class Trajectory:
    """A prompt with one completion, and what is known of it."""

    prompt_ids: list[int]
    completion: Completion
    domain: str
    problem_id: str
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    teacher: str | None = None
