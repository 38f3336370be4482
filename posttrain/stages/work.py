"""Everything a stage needs, and the bookkeeping around each: started, done before, failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from posttrain.cluster import Cluster
from posttrain.data import DomainData
from posttrain.errors import BadInput, RunFailed
from posttrain.observe.metrics import read_metrics
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.trainers.jobs import StageResult


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

    def __post_init__(self) -> None:
        for record in read_metrics(self.run.path / "metrics.jsonl"):
            if record.get("event") == "evaluated":
                self.measured[record["checkpoint"], record["domain"], record["split"], record["sampling"]] = record["pass@1"]

    def stage(self, name: str, steps: int, do: Callable[[str], Any]) -> Path:
        """Run one stage unless it is done already, and return its checkpoint.

        Args:
            do: takes the directory to write, and returns a Ray reference to a `StageResult`.
        """
        done = self.run.stage(name)
        checkpoint = self.run.stage_checkpoint(name)
        if done.status == "done" and checkpoint is not None:
            return checkpoint
        started = time.monotonic()
        self.run.start_stage(name)
        self.run.append_event({"event": "stage_started", "stage": name, "steps": steps})
        try:
            result: StageResult = wait(do(str(self.run.checkpoint_path(name))), self.run.log_path)
        except (BadInput, RunFailed) as error:
            self.run.fail_stage(name, str(error))
            self.run.append_event({"event": "stage_failed", "stage": name, "error": str(error)})
            raise
        seconds = time.monotonic() - started
        self._record_rollouts(result)
        self.run.finish_stage(name, result.checkpoint, seconds, result.metrics)
        self.run.append_event(
            {"event": "stage_finished", "stage": name, "seconds": seconds, "steps": result.steps,
             "checkpoint": result.checkpoint}
        )  # fmt: skip
        return Path(result.checkpoint)

    def _record_rollouts(self, result: StageResult) -> None:
        if result.max_abs_logprob_diff is None:
            return
        kept = ("stage", "max_abs_logprob_diff", "k3", "weight_sync_seconds")
        fields = {key: value for key, value in asdict(result).items() if key in kept}
        self.run.append_event({"event": "rollout_stats", **fields})


def wait(reference: Any, log: Path) -> Any:
    """`ray.get` with the project's own errors as they were raised; of anything else the cause, its traceback in `log`."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, BadInput | RunFailed):
            raise error.cause from None
        with log.open("a") as file:
            file.write(f"{error}\n")
        raise RunFailed(f"{type(error.cause).__name__}: {error.cause} (the traceback is in {log})") from error
    except RayError as error:
        raise RunFailed(f"an actor died: {error}") from error
