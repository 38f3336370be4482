"""The Ray cluster of a run, and the actors on it: trainers, rollout workers, teachers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput, RunFailed
from posttrain.recipe import Recipe

if TYPE_CHECKING:
    from distill.teacher import TeacherPool
    from rollouts.pool import RolloutClient, RolloutPool

ACTOR_CPUS = 0.01
"""What an actor claims of Ray's CPUs: on a small machine they all share, each with `cluster.threads` threads."""
OBJECT_STORE_BYTES = 256 << 20
TEACHER_BYTES = 1 << 30


@dataclass
class Cluster:
    """The actors of a run. `slots` experts can be grown at once, each with a trainer and rollout workers of its own."""

    recipe: Recipe
    dashboard: str | None
    trainers: list[Any] = field(default_factory=list)
    pool: RolloutPool | None = None
    _teachers: TeacherPool | None = None

    @property
    def slots(self) -> int:
        """Experts that can be trained side by side."""
        return min(self.recipe.cluster.trainers, self.recipe.cluster.rollout_workers)

    def client(self, slot: int | None = None) -> RolloutClient:
        """All rollout workers, or those of one slot."""
        if self.pool is None:
            raise RunFailed("the rollout workers have not been started")
        workers = self.recipe.cluster.rollout_workers
        return self.pool.client(None if slot is None else range(slot, workers, self.slots))

    def teachers(self) -> TeacherPool:
        """The teacher workers, started when they are first asked for."""
        if self._teachers is None:
            from distill.teacher import start_teachers

            cluster = self.recipe.cluster
            options = {"num_cpus": ACTOR_CPUS, "runtime_env": {"env_vars": _environment(cluster.threads)}}
            count, family = cluster.teacher_workers, self.recipe.model.family
            self._teachers = start_teachers(count, family, TEACHER_BYTES, cluster.threads, options)
        return self._teachers


@contextmanager
def start_cluster(recipe: Recipe, run_directory: Path, engine_description: Path) -> Iterator[Cluster]:
    """Start Ray (or join the recipe's cluster) and the actors; stop exactly what was started at the end.

    Args:
        engine_description: the directory that rollout engines read their model's configuration from.

    Raises:
        BadInput: no Ray cluster at `cluster.address`, or an engine refuses its settings.
    """
    import ray

    own = recipe.cluster.address is None
    info = _connect(recipe)
    cluster = Cluster(recipe, f"http://{info['webui_url']}" if info.get("webui_url") else None)
    try:
        _start_actors(cluster, run_directory, engine_description)
        yield cluster
    finally:
        if cluster.pool is not None:
            cluster.pool.stop()
        for actor in [*cluster.trainers, *(cluster._teachers.workers if cluster._teachers else [])]:
            ray.kill(actor, no_restart=True)
        if own or ray.is_initialized():
            ray.shutdown()


def _connect(recipe: Recipe) -> dict[str, Any]:
    import ray

    settings = recipe.cluster
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if settings.address is None else "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if settings.address is not None:
        try:
            return dict(ray.init(address=settings.address, **options).address_info)
        except ConnectionError as error:
            raise BadInput(f"cluster.address: no Ray cluster answers at {settings.address!r} ({error})") from error
    context = ray.init(
        address="local",
        include_dashboard=settings.dashboard,
        dashboard_host=settings.dashboard_host,
        dashboard_port=settings.dashboard_port,
        object_store_memory=OBJECT_STORE_BYTES,
        **options,
    )
    return dict(context.address_info)


def _environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _start_actors(cluster: Cluster, run_directory: Path, engine_description: Path) -> None:
    """All processes import and build at the same time; the call returns when the engines serve."""
    import ray

    from posttrain.trainers.actor import TrainerActor
    from rollouts.pool import RolloutPool
    from rollouts.settings import engine_kind, engine_settings

    recipe, settings = cluster.recipe, cluster.recipe.cluster
    actor = ray.remote(TrainerActor).options(
        num_cpus=ACTOR_CPUS,
        num_gpus=settings.gpus_per_worker,
        runtime_env={"env_vars": _environment(settings.threads)},
    )
    recipe_json = recipe.model_dump_json()
    cluster.trainers = [actor.remote(slot, recipe_json, str(run_directory)) for slot in range(settings.trainers)]
    kind = engine_kind(recipe.model.family, recipe.rollout)
    engines = engine_settings(engine_description, kind, recipe.rollout, settings.threads)
    cluster.pool = RolloutPool(engines, settings.rollout_workers, settings.gpus_per_worker)


class Slots:
    """Hands out slot numbers to threads, so that no two experts use one trainer at a time."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._changed = threading.Condition()

    @contextmanager
    def taken(self) -> Iterator[int]:
        """Wait for a free slot and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            slot = self._free.pop(0)
        try:
            yield slot
        finally:
            with self._changed:
                self._free.append(slot)
                self._changed.notify()
