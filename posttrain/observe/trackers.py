"""Experiment trackers that a recipe can ask for; all of them work without a network."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from posttrain.errors import BadInput
from posttrain.recipe import Recipe


class Tracker(Protocol):
    """Takes what a run measures."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float], time: float) -> None:
        """Numbers of a step of a stage, at a unix time."""

    def close(self) -> None:
        """Nothing comes any more."""


class TensorBoard:
    """Event files in `runs/<name>/tensorboard`, to be looked at with `tensorboard --logdir runs`."""

    def __init__(self, run_directory: Path, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_directory / "tensorboard"))

    def log(self, stage: str, step: int, metrics: Mapping[str, float], time: float) -> None:
        """See `Tracker`; a metric of a stage is a tag."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step, walltime=time)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Trackio:
    """A database in `runs/<name>/trackio` unless TRACKIO_DIR says otherwise; `trackio show` shows it."""

    def __init__(self, run_directory: Path, recipe: Recipe) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run_directory / "trackio"))  # read when it is imported
        with contextlib.redirect_stdout(io.StringIO()):
            import trackio

            self._run = trackio.init(
                recipe.name,
                run_directory.name,
                config=recipe.model_dump(mode="json"),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, stage: str, step: int, metrics: Mapping[str, float], time: float) -> None:
        """See `Tracker`. Experts grow side by side, so the tracker's own step only counts."""
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        """See `Tracker`."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


class WeightsAndBiases:
    """Files in `runs/<name>/wandb`, for `wandb sync`; WANDB_MODE=online sends them at once."""

    def __init__(self, run_directory: Path, recipe: Recipe) -> None:
        import wandb

        self._stages: set[str] = set()
        self._run = wandb.init(
            project=recipe.name,
            name=run_directory.name,
            dir=str(run_directory),
            config=recipe.model_dump(mode="json"),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]  # its own check is better
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True),
        )

    def log(self, stage: str, step: int, metrics: Mapping[str, float], time: float) -> None:
        """See `Tracker`; each stage has an axis of its own."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        """See `Tracker`."""
        import wandb

        self._run.finish()
        wandb.teardown()  # ends its process, before a run that cleans up does and wandb complains


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WeightsAndBiases}


def check_trackers(recipe: Recipe) -> None:
    """Raise BadInput for a tracker that is not installed."""
    for index, name in enumerate(recipe.trackers):
        if importlib.util.find_spec(name) is None:
            raise BadInput(
                f"trackers[{index}]: {name} is not installed here; install it (`pip install {name}`) or leave it out"
            )
