"""Room for all actors of a run, taken at once or not at all: a placement group of Ray's.

Two runs that share a cluster would otherwise each hold a part of it and wait for the rest for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from posttrain.recipe.schema import ClusterConfig

ACTOR_CPUS = 0.01
"""What an actor claims of Ray's CPUs: on a small machine they all share, each with `cluster.threads` threads."""
TELL_SECONDS = 30
"""How often one that waits for room says so; whole seconds, Ray cuts the rest off."""


def actors_of(settings: ClusterConfig, trainers: bool = True) -> int:
    """How many actors there will be; without trainers, as in `posttrain eval`, there are no teachers either."""
    return settings.rollout_workers + (settings.trainers + settings.teacher_workers if trainers else 0)


def reserve(settings: ClusterConfig, actors: int, tell: Callable[[str], None]) -> PlacementGroup:
    """A bundle for each actor, spread over the nodes or packed; waits for room, and says so."""
    import ray
    from ray.util.placement_group import placement_group

    bundle = {"CPU": ACTOR_CPUS}
    if settings.gpus_per_worker:
        bundle["GPU"] = settings.gpus_per_worker
    group = placement_group([bundle] * actors, strategy=settings.placement.upper())
    while not group.wait(TELL_SECONDS):
        free = ray.available_resources()
        has = f"{free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPUs"
        tell(f"waiting for room for {actors} actors ({settings.gpus_per_worker:g} GPUs each): {has} are free")
    return group


def inside(group: PlacementGroup) -> dict[str, Any]:
    """Options of an actor that takes a bundle of the group, whichever is free."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {"num_cpus": ACTOR_CPUS, "scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
