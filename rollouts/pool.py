"""The rollout service of a run, started and stopped by the driver."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from posttrain.actors import describe_death
from posttrain.errors import BadInput, RunFailed
from posttrain.placement import ACTOR_CPUS
from rollouts.client import RolloutClient
from rollouts.fleet import own_error
from rollouts.service import RolloutService, ServiceSettings, ServiceStats
from rollouts.settings import EngineInfo, EngineSettings, engine_environment

__all__ = ["RolloutClient", "RolloutPool"]


class RolloutPool:
    """Starts the rollout service with its workers, and stops both again. Ray must be initialised.

    The engines come up in parallel and without weights: publish or load a checkpoint before generating.
    Can be used as a context manager.

    Args:
        settings: The same for every worker.
        workers: How many.
        gpus_per_worker: Ray GPUs that each of them claims.
        directory: Of the log; what an earlier run left there is continued. Default: one that is gone afterwards.
        options: Further fields of `ServiceSettings`.

    Raises:
        BadInput: settings that the model cannot serve.
        RunFailed: workers died while starting.
    """

    def __init__(
        self,
        settings: EngineSettings,
        workers: int,
        gpus_per_worker: float = 0,
        directory: str | Path | None = None,
        **options: Any,
    ) -> None:
        begin = time.monotonic()
        self._temporary = tempfile.TemporaryDirectory(prefix="rollouts-") if directory is None else None
        place = Path(self._temporary.name if self._temporary else str(directory)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        started = ServiceSettings(settings, workers, str(place), gpus_per_worker)
        self._service = (
            ray.remote(RolloutService)
            .options(
                num_cpus=ACTOR_CPUS,
                max_restarts=-1,
                # Its log and lock are here.
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
                runtime_env={"env_vars": engine_environment(settings.threads)},
            )
            .remote(replace(started, **options))
        )
        self._stopped = False
        try:
            self._info: EngineInfo = self._get("start", True)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - begin

    def client(self, lane: int = 0, lanes: int = 1) -> RolloutClient:
        """A client of the workers whose index leaves `lane` when divided by `lanes`; default: of all."""
        return RolloutClient(self._service, (lane, lanes), self._info)

    def resize(self, workers: int) -> None:
        """Have so many workers, at least one; those that go leave their samples to the others."""
        if workers < 1:
            raise BadInput(f"{workers} rollout workers: at least one is needed")
        self.client().resize(workers)

    def health(self, seconds: float) -> ServiceStats | None:
        """The state of the service; None when it does not say within so many seconds."""
        try:
            _, stats = ray.get(self._service.call.remote(None, "service_stats"), timeout=seconds)
        except RayError:  # too late, or failed, which whoever waits for samples is told
            return None
        return stats

    def replace_service(self) -> None:
        """Kill the service; Ray starts another one, which goes on from the log."""
        ray.kill(self._service, no_restart=False)

    def stop(self) -> None:
        """End the service and its workers; may be called again."""
        if self._stopped:
            return
        self._stopped = True
        with suppress(Exception):  # it is killed anyway, and its workers with it
            ray.get(self._service.stop.remote(), timeout=10)
        ray.kill(self._service, no_restart=True)
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _get(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._service, method).remote(*arguments))
        except RayTaskError as error:
            raise own_error(error) from None
        except RayActorError as error:
            raise RunFailed(describe_death(error)) from None
