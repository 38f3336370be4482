"""What goes into the rollout service and what comes out: tokens first, text never."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How to sample. `seed` makes every request reproducible: request i, sample j uses a stream of its own."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    """Completions for each prompt."""
    seed: int = 0


@dataclass
class Completion:
    """One sampled answer. `logprobs` are the sampler's own, of what it sampled from (temperature applied)."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    """`stop` (an end-of-sequence token, which is the last token) or `length`."""
    weight_version: int


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
