"""An engine in a Ray actor of its own, on which tests run whatever function they like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from posttrain.recipe.schema import RolloutConfig
from rollouts.engine import Engine
from rollouts.publishing import PublishedWeights, receive
from rollouts.settings import EngineKind, EngineSettings, engine_environment, engine_settings, write_description


class Host:
    """The methods of the actor."""

    def __init__(self, settings: EngineSettings) -> None:
        self._engine = Engine(settings)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(engine, *arguments)`."""
        return function(self._engine, *arguments)

    def receive(self, published: PublishedWeights) -> tuple[int, list[str]]:
        """How many tensors were verified, and which were not."""
        found = receive(self._engine, published)
        return found.verified, found.unverified


class EngineActor:
    """Starts the actor; errors arrive as the project's own."""

    def __init__(self, checkpoint: Path, kind: EngineKind, rollout: RolloutConfig, quantised: bool = True) -> None:
        description = checkpoint.parent / f"{checkpoint.name}-description"
        write_description(checkpoint, description, kind, quantised)
        settings = engine_settings(description, kind, rollout, threads=1)
        options = {"num_cpus": 0.01, "runtime_env": {"env_vars": engine_environment(1)}}
        self.handle = ray.remote(Host).options(**options).remote(settings)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(engine, *arguments)` in the actor."""
        return self._get(self.handle.run.remote(function, *arguments))

    def receive(self, published: PublishedWeights) -> tuple[int, list[str]]:
        """See `Host.receive`."""
        return self._get(self.handle.receive.remote(published))

    def kill(self) -> None:
        """End it."""
        ray.kill(self.handle, no_restart=True)

    @staticmethod
    def _get(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if error.cause is not None else error) from error
