"""The Ray cluster of a run, and the actors on it: trainers, rollout workers, teachers."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from posttrain.errors import BadInput, RunFailed
from posttrain.interrupts import ignored
from posttrain.observe.metrics import MetricsLog
from posttrain.observe.pulse import PULSES
from posttrain.placement import actors_of, inside, reserve
from posttrain.recipe import Recipe

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from distill.pool import TeacherPool
    from rollouts.pool import RolloutClient, RolloutPool

DASHBOARD_PORT = 8265
"""Ray's default, and the recipe's. When it is taken, the dashboard listens on the next free port."""
FAREWELL_SECONDS = 1.5
"""How long processes have to end by themselves after Ray was shut down."""
OBJECT_STORE_BYTES = 256 << 20
SLOW_START = "The current node timed out during startup"
"""What `ray.init` says when its processes had too little time to start."""


@dataclass
class Cluster:
    """The actors of a run. `slots` experts can be grown at once, each with a trainer and rollout workers of its own."""

    recipe: Recipe
    dashboard: str | None = None
    metrics: str | None = None
    """Where Prometheus finds the metrics of this machine's processes."""
    trainers: list[Any] = field(default_factory=list)
    pool: RolloutPool | None = None
    pulses: Path | None = None
    """Where actors leave signs of life."""
    room: PlacementGroup | None = None
    """Of trainers, teachers and rollout workers."""
    _teachers: TeacherPool | None = None

    @property
    def slots(self) -> int:
        """Experts that can be trained side by side."""
        return min(self.recipe.cluster.trainers, self.recipe.cluster.rollout_workers)

    def client(self, slot: int | None = None) -> RolloutClient:
        """All rollout workers, or those of one slot."""
        if self.pool is None:
            raise RunFailed("the rollout workers have not been started")
        return self.pool.client() if slot is None else self.pool.client(slot, self.slots)

    def teachers(self) -> TeacherPool:
        """The teacher workers, started when they are first asked for."""
        if self._teachers is None:
            from distill.pool import start_teachers

            cluster, options = self.recipe.cluster, self.actor_options()
            count, family, budget = cluster.teacher_workers, self.recipe.model.family, cluster.teacher_memory_mib << 20
            self._teachers = start_teachers(count, family, budget, cluster.threads, options, self.pulses)
        return self._teachers

    def actor_options(self) -> dict[str, Any]:
        """Of trainers and teachers, for Ray."""
        assert self.room is not None
        environment = {"env_vars": _environment(self.recipe)}
        return {**inside(self.room), "num_gpus": self.recipe.cluster.gpus_per_worker, "runtime_env": environment}

    def replace_teacher(self, index: int) -> None:
        """Kill a teacher worker; Ray starts another one, and repeats what it was asked."""
        import ray

        assert self._teachers is not None
        ray.kill(self._teachers.workers[index], no_restart=False)

    def keep_first_trainer(self) -> None:
        """End the trainers of the other slots and free their memory: what follows the experts needs one."""
        import ray

        for actor in self.trainers[1:]:
            ray.kill(actor, no_restart=True)
        del self.trainers[1:]

    def stop_actors(self) -> None:
        """Kill every actor that was started; whoever waits for one of them gets an error. May be called again."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if self.pool is not None:
            self.pool.stop()
        for actor in [*self.trainers, *(self._teachers.workers if self._teachers else [])]:
            ray.kill(actor, no_restart=True)
        if self.room is not None:
            remove_placement_group(self.room)


@contextmanager
def start_cluster(recipe: Recipe, engine_description: Path, run_directory: Path | None) -> Iterator[Cluster]:
    """Start Ray (or join the recipe's cluster) and the actors; stop exactly what was started at the end.

    Args:
        engine_description: the directory that rollout engines read their model's configuration from.
        run_directory: where trainers write their metrics; None: no trainers, rollout workers only.

    Raises:
        BadInput: no Ray cluster at `cluster.address`, fewer GPUs than asked for, or an engine refuses its settings.
    """
    import ray

    cluster = Cluster(recipe)
    others = _children()
    try:
        address = _connect(recipe).get("webui_url")
        cluster.dashboard = f"http://{address}" if address else None
        cluster.metrics = _metrics_address()
        _check_gpus(recipe, trainers=run_directory is not None)
        _start_actors(cluster, engine_description, run_directory)
        yield cluster
    finally:
        with ignored():
            ours = _children() - others
            if ray.is_initialized():
                cluster.stop_actors()
                ray.shutdown()
            _end(ours)


def check_dashboard(recipe: Recipe) -> None:
    """Raise BadInput when the dashboard of a cluster of our own could not listen where the recipe says."""
    settings = recipe.cluster
    if settings.address is not None or not settings.dashboard:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.dashboard_host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        raise BadInput(f"cluster.dashboard_host: {settings.dashboard_host!r} is no address here ({error})") from error
    if settings.dashboard_port == DASHBOARD_PORT:  # Ray takes the next free one
        return
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address[0], settings.dashboard_port, *address[2:]))
    except OSError as error:
        raise BadInput(
            f"cluster.dashboard_port: {settings.dashboard_port} cannot be used ({error}); name a free port, or "
            f"{DASHBOARD_PORT} for the first free one from there"
        ) from error


def _connect(recipe: Recipe) -> dict[str, Any]:
    import ray

    settings = recipe.cluster
    reach_other_machines(settings.address is not None)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if settings.address is None else "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # workers that our actors would not use
    os.environ.setdefault("METRICS_RECORD_INTERVAL_S", "60")  # the dashboard about itself: a quarter of its cost
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if settings.address is not None:
            return dict(ray.init(address=settings.address, **options).address_info)
        return _start_ray(
            include_dashboard=settings.dashboard,
            dashboard_host=settings.dashboard_host,
            dashboard_port=None if settings.dashboard_port == DASHBOARD_PORT else settings.dashboard_port,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    except ConnectionError as error:
        if settings.address is None:
            raise
        raise BadInput(f"cluster.address: no Ray cluster answers at {settings.address!r} ({error})") from error
    except SystemExit:
        raise KeyboardInterrupt from None  # what Ray's own handler of SIGTERM does
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # `ray.init` has put its own in place


def _start_ray(**options: Any) -> dict[str, Any]:
    """A Ray cluster of our own.

    Its processes have 30 s to start, a constant in ray/_private/node.py (2.60) and too little on a machine that is
    busy for a while: then they are ended, and there is one more try.
    """
    import ray

    others = _children()
    try:
        return dict(ray.init(address="local", **options).address_info)
    except Exception as error:
        if SLOW_START not in str(error):
            raise
    print("Ray took more than 30 s to start; trying once more", flush=True)
    _end(_children() - others)
    return dict(ray.init(address="local", **options).address_info)


def reach_other_machines(wanted: bool) -> None:
    """Whether the Ray cluster of this process, to be started or joined, has nodes on other machines.

    Else its processes listen on 127.0.0.1 alone; by default they do so on all interfaces, and run what they are sent.
    Ray has the setting for desktops (ray/_private/services.py, `get_node_ip_address`, 2.60); it obeys it anywhere.
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = str(int(wanted))
    ray_constants.ENABLE_RAY_CLUSTER = wanted


def _metrics_address() -> str | None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["NodeID"] == here and node.get("MetricsExportPort")]
    return f"http://{nodes[0]['NodeManagerAddress']}:{nodes[0]['MetricsExportPort']}/metrics" if nodes else None


def _check_gpus(recipe: Recipe, trainers: bool) -> None:
    """Ray would wait for ever for what its machines do not have."""
    import ray

    there = ray.cluster_resources().get("GPU", 0)
    needed = gpus_needed(recipe, trainers)
    if needed > there:
        raise BadInput(
            f"cluster.gpus_per_worker: the workers need {needed:g} GPUs in all (gpus_per_worker times trainers, "
            f"rollout_workers and teacher_workers); Ray finds {there:g}"
        )


def gpus_needed(recipe: Recipe, trainers: bool = True) -> float:
    """GPUs that the actors claim in all; without trainers, as in `posttrain eval`, there are no teachers either."""
    return recipe.cluster.gpus_per_worker * actors_of(recipe.cluster, trainers)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    """See to it that they have ended, a little later at most, so that a run leaves nothing behind."""
    _, left = psutil.wait_procs(processes, timeout=FAREWELL_SECONDS)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def _environment(recipe: Recipe) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {
        **({"POSTTRAIN_KERNELS": recipe.model.kernels} if recipe.model.kernels else {}),
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(recipe.cluster.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _start_actors(cluster: Cluster, engine_description: Path, run_directory: Path | None) -> None:
    """All processes import and build at the same time; the call returns when the engines serve."""
    import ray

    from posttrain.trainers.actor import TrainerActor
    from rollouts.pool import RolloutPool
    from rollouts.settings import engine_kind, engine_settings

    recipe, settings = cluster.recipe, cluster.recipe.cluster
    metrics = MetricsLog(run_directory / "metrics.jsonl") if run_directory is not None else None

    def tell(message: str) -> None:
        if metrics is not None:
            metrics.event("warning", stage="run", message=message)

    cluster.room = reserve(settings, actors_of(settings, trainers=run_directory is not None), tell)
    if run_directory is not None:
        cluster.pulses = run_directory / PULSES
        shutil.rmtree(cluster.pulses, ignore_errors=True)  # of an earlier life
        actor = ray.remote(TrainerActor).options(**cluster.actor_options())
        recipe_json = recipe.model_dump_json()
        cluster.trainers = [actor.remote(slot, recipe_json, str(run_directory)) for slot in range(settings.trainers)]
    kind = engine_kind(recipe.model.family, recipe.rollout)
    engines = engine_settings(engine_description, kind, recipe.rollout, settings.threads, recipe.model.kernels)
    log = run_directory / "rollouts" if run_directory is not None else None
    caps = {name: domain.max_running for name, domain in recipe.domains.items() if domain.max_running is not None}
    cluster.pool = RolloutPool(
        engines,
        settings.rollout_workers,
        settings.gpus_per_worker,
        log,
        domain_running=caps,
        metrics=metrics,
        room=cluster.room,
    )
