"""Many episodes at once, in lock step: every one that goes on takes its next turn in one batch."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from rollouts.environments.episode import Episode
from rollouts.types import Completion, Sampling

Generate = Callable[[list[list[int]], int], list[Completion]]
"""(token prompts, the most tokens for each) → one completion of each."""


class Client(Protocol):
    """What is needed of a `RolloutClient`."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt."""
        ...


def run_episodes(episodes: Sequence[Episode], generate: Generate) -> None:
    """Take turns until every episode has its outcome.

    Episodes with the same budget of tokens (most of them, until the whole episode's limit comes near) are one call.
    """
    while going := [episode for episode in episodes if episode.outcome is None]:
        batches: defaultdict[int, list[Episode]] = defaultdict(list)
        for episode in going:
            batches[episode.budget].append(episode)
        for budget, batch in sorted(batches.items()):
            completions = generate([episode.context_ids for episode in batch], budget)
            for episode, completion in zip(batch, completions, strict=True):
                episode.advance(completion)


def client_generator(client: Client, sampling: Sampling) -> Generate:
    """Generation by rollout workers. The same episodes with the same `sampling` take the same course.

    Args:
        sampling: `n` is 1: for a group, begin as many episodes. The episodes' limits stand in for `max_tokens`.
    """
    if sampling.n != 1:
        raise ValueError("episodes are sampled one by one: begin several of a problem instead of n > 1")
    calls = 0

    def generate(prompts: list[list[int]], max_tokens: int) -> list[Completion]:
        nonlocal calls
        # Prompt i of every call has the same random numbers for the same seed.
        digest = hashlib.sha256(f"{sampling.seed}/{calls}".encode()).digest()
        calls += 1
        turn = replace(sampling, max_tokens=max_tokens, seed=int.from_bytes(digest[:4]) >> 1)
        return [group[0] for group in client.generate(prompts, turn)]

    return generate
