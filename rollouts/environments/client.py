"""Groups of episodes from the rollout service: between the turns of a conversation, its environment answers.

To a trainer this is the service itself: it submits groups and collects finished ones. Behind it, each turn of each
episode is a request of its own, submitted as soon as the turn before it has been answered: episodes do not wait for one
another. The request of turn t of episode j has the id `<group>/<j>/<t>` and random numbers of its own that depend on
nothing else: after a restart the log hands out the turns that were finished, and the rest is the same tokens again.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.errors import RunFailed
from rollouts.asking import answers_to
from rollouts.environments.episode import Episode
from rollouts.types import UNNAMED, Completion, FinishedGroup, GroupRequest, Sampling

if TYPE_CHECKING:
    import numpy as np


class Service(Protocol):
    """What is needed of a `RolloutClient`; see there."""

    def weight_version(self) -> int | None: ...

    def publish(self, weights: Mapping[str, np.ndarray], version: int) -> float: ...

    def submit(self, groups: Sequence[GroupRequest]) -> None: ...

    def collect(
        self, count: int, ids: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[FinishedGroup]: ...

    def consume(self, ids: Sequence[str]) -> None: ...

    def acknowledge(self, ids: Sequence[str]) -> None: ...

    def forget_under(self, prefix: str) -> None: ...

    def cancel(self, ids: Sequence[str]) -> None: ...


class Episodes(Protocol):
    """Where episodes come from (`posttrain.stages.episodes.DomainEpisodes`)."""

    def __contains__(self, problem_id: str) -> bool:
        """Whether a problem has an environment; of the others, groups are answers as the service gives them."""
        ...

    def begin(self, problem_id: str, tokens: int, prompt_ids: list[int] | None = None) -> Episode:
        """A new episode of at most `tokens` tokens after its prompt; that is not encoded if its tokens are known."""
        ...


@dataclass(eq=False)
class _Group:
    request: GroupRequest
    episodes: list[Episode]
    turn_ids: list[str] = field(default_factory=list)
    """Of all requests so far."""


class EpisodeClient:
    """The rollout service with environments. For one thread."""

    def __init__(self, client: Service, episodes: Episodes) -> None:
        self._client = client
        self._episodes = episodes
        self._groups: dict[str, _Group] = {}
        """Until they are acknowledged or cancelled."""
        self._running: dict[str, tuple[_Group, int]] = {}
        """Requests of turns: group and number of the episode."""
        self._answers: set[str] = set()
        """Groups that the service answers by itself, until they have ended."""
        self._ended: dict[str, FinishedGroup] = {}
        """Not collected yet, in the order in which they ended."""

    def weight_version(self) -> int | None:
        """The service's."""
        return self._client.weight_version()

    def publish(self, weights: Mapping[str, np.ndarray], version: int) -> float:
        """The service's: turns that run go on under the new weights, and so do the turns after them."""
        return self._client.publish(weights, version)

    def submit(self, groups: Sequence[GroupRequest]) -> None:
        """Begin the episodes of `groups`: `sampling.n` of each, of at most `sampling.max_tokens` tokens.

        Raises:
            RunFailed: an environment that begins a problem in another way than when its prompt was made.
        """
        requests: list[GroupRequest] = []
        for request in groups:
            if request.problem_id in self._episodes:
                group = self._groups[request.id] = _Group(request, self._begin(request))
                requests += [self._next_turn(group, number) for number in range(request.sampling.n)]
            else:
                self._answers.add(request.id)
                requests.append(request)
        self._client.submit(requests)

    def collect(
        self, count: int, ids: Sequence[str] | None = None, timeout: float | None = None
    ) -> list[FinishedGroup]:
        """As the service's, without a timeout."""
        if timeout is not None:
            raise ValueError("episodes are collected without a timeout")
        wanted = None if ids is None else set(ids)
        while len(self._ended) < count if wanted is None else not wanted <= self._ended.keys():
            self._advance()
        return [self._ended.pop(name) for name in ([*self._ended][:count] if ids is None else ids)]

    def consume(self, ids: Sequence[str]) -> None:
        """The service's, of all turns."""
        self._client.consume(self._forget(ids))

    def acknowledge(self, ids: Sequence[str]) -> None:
        """The service's, of all turns."""
        self._client.acknowledge(self._forget(ids))

    def forget_under(self, prefix: str) -> None:
        """The service's: the ids of turns begin with those of their groups."""
        self._client.forget_under(prefix)

    def cancel(self, ids: Sequence[str]) -> None:
        """The service's, of all turns."""
        self._client.cancel(self._forget(ids))

    def play(self, problem_ids: Sequence[str], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` episodes of each problem. The same problems with the same `sampling` give the same episodes.

        Raises:
            RunFailed: a turn that ends every engine it comes to.
        """
        name = f"{UNNAMED}{uuid.uuid4().hex}"
        prompts = [self._episodes.begin(problem_id, sampling.max_tokens).prompt_ids for problem_id in problem_ids]
        groups = [
            GroupRequest(f"{name}/{row}", prompt, sampling, row, problem_id=problem_id)
            for row, (problem_id, prompt) in enumerate(zip(problem_ids, prompts, strict=True))
        ]
        return answers_to(self, groups, lambda request: f"an episode of {request.problem_id}")

    def _begin(self, request: GroupRequest) -> list[Episode]:
        tokens, known = request.sampling.max_tokens, list(request.prompt_ids)
        first = self._episodes.begin(request.problem_id, tokens)
        others = [self._episodes.begin(request.problem_id, tokens, known) for _ in range(request.sampling.n - 1)]
        if first.prompt_ids != known or any(other.messages != first.messages for other in others):
            raise RunFailed(
                f"the environment of {request.problem_id} begins in another way each time: `reset` must give the same "
                "messages for the same problem"
            )
        return [first, *others]

    def _next_turn(self, group: _Group, number: int) -> GroupRequest:
        """The request of an episode's next turn."""
        request, episode = group.request, group.episodes[number]
        turn = len(episode.turns)
        digest = hashlib.sha256(f"{request.sampling.seed}/{number}/{turn}".encode()).digest()
        sampling = replace(
            request.sampling, max_tokens=episode.budget, n=1, seed=int.from_bytes(digest[:4], "big") >> 1
        )
        session = f"{request.id}/{number}"
        name = f"{session}/{turn}"
        group.turn_ids.append(name)
        self._running[name] = group, number
        return GroupRequest(name, episode.context_ids, sampling, request.index, request.domain, session)

    def _advance(self) -> None:
        """Wait for a turn to end; take all that have ended, and ask for those that follow."""
        waiting = len(self._running) + len(self._answers)
        if not waiting:
            raise RunFailed("more groups are collected than were submitted")
        finished = self._client.collect(1)
        if waiting > 1:
            finished += self._client.collect(waiting - 1, timeout=0)
        following: list[GroupRequest] = []
        for one in finished:
            if one.request.id in self._answers:
                self._answers.remove(one.request.id)
                self._ended[one.request.id] = one
            if one.request.id not in self._running:
                continue
            group, number = self._running.pop(one.request.id)
            if one.failure is not None:
                self._give_up(group, one.failure)
                continue
            group.episodes[number].advance(one.completions[0])
            if group.episodes[number].outcome is None:
                following.append(self._next_turn(group, number))
            elif all(episode.outcome is not None for episode in group.episodes):
                completions = [episode.completion() for episode in group.episodes]
                self._ended[group.request.id] = FinishedGroup(group.request, completions)
        following = [request for request in following if request.id in self._running]  # unless it was given up
        if following:
            self._client.submit(following)

    def _give_up(self, group: _Group, reason: str) -> None:
        self._client.cancel(self._stop(group))
        self._ended[group.request.id] = FinishedGroup(group.request, [], reason)

    def _stop(self, group: _Group) -> list[str]:
        """Wait for none of its turns any more; returns all of them."""
        for name in group.turn_ids:
            self._running.pop(name, None)
        return group.turn_ids

    def _forget(self, ids: Sequence[str]) -> list[str]:
        """Returns the requests that the groups consist of."""
        requests: list[str] = []
        for group_id in ids:
            group = self._groups.pop(group_id, None)
            self._ended.pop(group_id, None)
            self._answers.discard(group_id)
            requests += [group_id] if group is None else self._stop(group)
        return requests


def with_episodes(client: Any, episodes: Episodes | None) -> Any:
    """The service, with environments if there are any."""
    return client if episodes is None else EpisodeClient(client, episodes)
