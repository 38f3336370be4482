"""Everything a stage needs, and the bookkeeping around each: started, done before, stopped, failed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from posttrain.actors import describe_death
from posttrain.cluster import Cluster
from posttrain.data import DomainData
from posttrain.errors import BadInput, RunFailed
from posttrain.observe.metrics import read_metrics
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory
from posttrain.snapshots import Origin, check_origin, newest_good
from posttrain.stages.origin import code_hash, inputs_of
from posttrain.stages.side_by_side import Stopped
from posttrain.trainers.jobs import SnapshotPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.trainers.jobs import StageResult
    from rollouts.pool import RolloutClient
    from rollouts.worker import WorkerStats


@dataclass
class Work:
    """A run in progress."""

    recipe: Recipe
    run: RunDirectory
    domains: dict[str, DomainData]
    tokenizer: PreTrainedTokenizerBase
    cluster: Cluster
    measured: dict[tuple[str, str, str, str], float] = field(default_factory=dict)
    """pass@1 by checkpoint, domain, split and sampling: what a resumed run need not measure again."""
    hooked: set[tuple[str, str]] = field(default_factory=set)
    """The evaluation hooks that were run, by checkpoint and name."""
    gates: dict[str, bool] = field(default_factory=dict)
    """The experts' gates that were decided, by stage."""
    ending: Event = field(default_factory=Event)
    """Set when nothing new is to be started any more."""
    interrupted: bool = False
    """The actors were killed by this process: their deaths are not errors."""

    def __post_init__(self) -> None:
        for record in read_metrics(self.run.path / "metrics.jsonl"):
            if record.get("event") == "evaluated":
                key = (record["checkpoint"], record["domain"], record["split"], record["sampling"])
                self.measured[key] = record["pass@1"]
            if record.get("event") == "hook":
                self.hooked.add((record["checkpoint"], record["hook"]))
            if record.get("event") == "gate":
                self.gates[record["stage"]] = record["passed"]
            if record.get("event") == "stage_reset":
                self._forget_measurements(record["stage"])

    def _forget_measurements(self, stage: str) -> None:
        """Its checkpoint will be another one."""
        checkpoint = str(self.run.checkpoint_path(stage))
        self.measured = {key: value for key, value in self.measured.items() if key[0] != checkpoint}
        self.hooked = {key for key in self.hooked if key[0] != checkpoint}
        self.gates.pop(stage, None)

    def interrupt(self) -> None:
        """Kill all actors, so that whatever waits for them returns."""
        self.interrupted = True
        self.ending.set()
        self.cluster.stop_actors()

    def require_going_on(self) -> None:
        """Raise `Stopped` when nothing new is to be started any more."""
        if self.ending.is_set():
            raise Stopped

    def stage(
        self,
        name: str,
        steps: int,
        do: Callable[[str, SnapshotPlan | None], Any],
        sampler: RolloutClient | None = None,
    ) -> Path:
        """Run one stage, or the rest of it, unless it is done already, and return its checkpoint.

        Args:
            do: takes the directory to write and the plan of snapshots, and returns a Ray reference to a `StageResult`.
            sampler: the rollout workers that the stage samples with.
        """
        known, checkpoint = self.run.stage(name), self.run.stage_checkpoint(name)
        if known.status in ("done", "dropped") and checkpoint is not None:
            self._forget_samples(name, sampler)
            return checkpoint
        self.require_going_on()
        started = time.monotonic()
        if not known.attempts:  # what is there under its name comes from other inputs
            self._forget_samples(name, sampler)
        plan, done = self._snapshots(name)
        self.run.note_origin(name, self._inputs[name], code_hash())
        self.run.start_stage(name)
        self.run.append_event(
            {"event": "stage_started", "stage": name, "steps": steps, **({"step": done} if done else {})}
        )
        try:
            before, asked = sampler.stats() if sampler else [], time.monotonic()
            result: StageResult = wait(do(str(self.run.checkpoint_path(name)), plan), self.run.log_path)
            after, elapsed = sampler.stats() if sampler else [], time.monotonic() - asked
        except BaseException as error:
            self._stopped(name, error)
            raise
        seconds = time.monotonic() - started
        if result.waited_seconds is not None:
            self._record_rollouts(result, before, after, elapsed)
        self.run.finish_stage(name, result.checkpoint, seconds, result.metrics)
        self.run.append_event(
            {"event": "stage_finished", "stage": name, "seconds": seconds, "steps": result.steps,
             "checkpoint": result.checkpoint}
        )  # fmt: skip
        self._forget_samples(name, sampler)
        shutil.rmtree(self.run.snapshots_path(name), ignore_errors=True)
        return Path(result.checkpoint)

    @cached_property
    def _inputs(self) -> dict[str, str]:
        return inputs_of(self.recipe, self.domains)

    def _snapshots(self, name: str) -> tuple[SnapshotPlan | None, int]:
        """What snapshots a stage is to write and which one it goes on from; how many of its steps that has."""
        config = self.recipe.snapshots
        if config is None:
            return None, 0

        def tell(message: str) -> None:
            self.run.append_event({"event": "warning", "stage": name, "message": message})

        directory, origin = self.run.snapshots_path(name), Origin(self._inputs[name], code_hash())
        check_origin(directory, origin)
        found = newest_good(directory, tell)
        resume = None if found is None else str(found.path)
        plan = SnapshotPlan(str(directory), config.every, config.keep, origin, resume)
        return plan, 0 if found is None else found.step

    @staticmethod
    def _forget_samples(stage: str, sampler: RolloutClient | None) -> None:
        """The stage's checkpoint has what was learned from its samples: it will not start again and ask for them."""
        if sampler is not None:
            sampler.forget_under(f"{stage}/")

    def _stopped(self, name: str, error: BaseException) -> None:
        """Note why a stage came to no end, as a failure or as an interruption (then raises `Stopped` in threads)."""
        if not isinstance(error, Exception):
            self.run.release_stage(name)
        elif self.interrupted:
            self.run.release_stage(name)
            raise Stopped from error
        else:
            text = str(error) if isinstance(error, BadInput | RunFailed) else f"{type(error).__name__}: {error}"
            self.run.fail_stage(name, text)
            self.run.append_event({"event": "stage_failed", "stage": name, "error": text})

    def _record_rollouts(
        self, result: StageResult, before: list[WorkerStats], after: list[WorkerStats], elapsed: float
    ) -> None:
        """Note a stage's sampling: by its result, and by each worker's totals before and after (`elapsed` seconds).

        A worker that was replaced meanwhile counts from its start.
        """
        start = {stats.pid: stats for stats in before}
        tokens = sum(stats.tokens - (start[stats.pid].tokens if stats.pid in start else 0) for stats in after)
        busy = [stats.busy_seconds - (start[stats.pid].busy_seconds if stats.pid in start else 0) for stats in after]
        idle = [stats.idle_seconds - (start[stats.pid].idle_seconds if stats.pid in start else 0) for stats in after]
        seconds, whole = max(busy, default=0.0), result.sampling_seconds
        shares = {
            "trainer_idle": min(1.0, (result.waited_seconds or 0.0) / whole),
            # While the trainer starts and ends, nobody asks for anything: that is no waiting.
            "generators_idle": min(1.0, max(0.0, (fmean(idle) - (elapsed - whole)) / whole)),
        } if whole and idle else {}  # fmt: skip
        self.run.append_event(
            {"event": "rollout_stats", "stage": result.stage, "max_abs_logprob_diff": result.max_abs_logprob_diff,
             "k3": result.k3, "weight_sync_seconds": result.weight_sync_seconds, "tokens": tokens, "seconds": seconds,
             "waited_seconds": result.waited_seconds, "off_policy": result.off_policy, **shares}
        )  # fmt: skip


def wait(reference: Any, log: Path) -> Any:
    """`ray.get` with the project's own errors as they were raised; of anything else the cause, the whole in `log`."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, BadInput | RunFailed):
            raise error.cause from None
        _append(log, error)
        if isinstance(error.cause, RayActorError):
            raise RunFailed(f"{describe_death(error.cause)} (more in {log})") from error
        raise RunFailed(f"{type(error.cause).__name__}: {error.cause} (the traceback is in {log})") from error
    except RayActorError as error:
        _append(log, error)
        raise RunFailed(f"{describe_death(error)} (more in {log})") from error
    except RayError as error:
        raise RunFailed(f"Ray failed: {error}") from error


def _append(log: Path, error: Exception) -> None:
    with log.open("a") as file:
        file.write(f"{error}\n")
