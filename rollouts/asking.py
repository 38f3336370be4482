"""Groups that are asked for and waited for at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from posttrain.errors import RunFailed
from rollouts.types import Completion, FinishedGroup, GroupRequest


class Asked(Protocol):
    """Who is asked: the rollout service, or the environments before it."""

    def submit(self, groups: Sequence[GroupRequest]) -> None: ...

    def collect(self, count: int, ids: Sequence[str] | None = None) -> list[FinishedGroup]: ...

    def acknowledge(self, ids: Sequence[str]) -> None: ...


def answers_to(
    client: Asked, groups: Sequence[GroupRequest], what: Callable[[GroupRequest], str]
) -> list[list[Completion]]:
    """The completions of `groups`, in their order; nothing of them stays with the client, whatever happens.

    Raises:
        RunFailed: a group was given up; `what` names it.
    """
    ids = [group.id for group in groups]
    try:
        client.submit(groups)
        finished = client.collect(len(ids), ids)
    finally:
        client.acknowledge(ids)
    for group in finished:
        if group.failure is not None:
            raise RunFailed(f"{what(group.request)} was given up: {group.failure}")
    return [group.completions for group in finished]
