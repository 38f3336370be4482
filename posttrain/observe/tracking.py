"""Hands what is written to metrics.jsonl on to Ray's metrics and to the recipe's trackers, from a thread of its own."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from posttrain.observe.exported import Exporter
from posttrain.observe.metrics import MetricsFollower, MetricsLog, Record
from posttrain.observe.periodic import Periodic
from posttrain.observe.runview import is_number, record_time
from posttrain.observe.trackers import TRACKERS, Tracker
from posttrain.recipe import Recipe

POLL_SECONDS = 1.0
REFRESH_SECONDS = 5.0

BY_STAGE = {
    "loss": "posttrain_loss",
    "learning_rate": "posttrain_learning_rate",
    "grad_norm": "posttrain_grad_norm",
    "tokens_per_second": "posttrain_tokens_per_second",
    "logprob_diff_max": "posttrain_logprob_difference",
    "staleness_mean": "posttrain_staleness",
    "importance_ratio_raw": "posttrain_importance_ratio",
}
BY_PART = {
    "reward": "posttrain_reward",
    "kl": "posttrain_kl",
    "entropy": "posttrain_entropy",
    "completion_length": "posttrain_completion_length",
    "teacher_busy": "posttrain_teacher_busy_share",
}
"""Metrics that are also recorded as `<metric>/<part>`."""
PHASES = ("generate", "publish", "reward", "divergence", "train")
STATES = {"stage_started": 1, "stage_finished": 2, "stage_failed": 3}
DROPPED = 4


class Tracking:
    """Follows a run's metrics.jsonl while the `with` block runs. Nothing that goes wrong here ends the run."""

    def __init__(self, run_directory: str | Path, recipe: Recipe) -> None:
        self._directory = Path(run_directory)
        self._recipe = recipe
        self._log = MetricsLog(self._directory / "metrics.jsonl")
        self._follower = MetricsFollower(self._log.path)
        self._exporter = Exporter(self._directory.name)
        self._export = RecordExport(self._exporter)
        self._trackers: dict[str, Tracker] = {}
        self._refreshed = 0.0
        self._thread = Periodic("tracking", POLL_SECONDS, self._follow)

    def __enter__(self) -> Tracking:
        self._export.pending(self._recipe.stage_names())
        for record in self._follower.new_records():  # of a run that is resumed
            self._export.take(record, past=True)
        for name in dict.fromkeys(self._recipe.trackers):
            try:
                self._trackers[name] = TRACKERS[name](self._directory, self._recipe)
            except Exception as error:
                self._give_up(name, error)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.stop()
        self._take(self._follower.new_records())
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close()
            except Exception as failure:
                self._give_up(name, failure)
        self._log.close()

    def _follow(self) -> None:
        self._take(self._follower.new_records())
        if time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            self._exporter.refresh()

    def _take(self, records: list[Record]) -> None:
        for record in records:
            self._export.take(record)
            found = tracked(record)
            if found is None:
                continue
            for name, tracker in list(self._trackers.items()):
                try:
                    tracker.log(*found, record_time(record))
                except Exception as error:
                    self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        message = f"the tracker {name} failed and gets nothing more: {type(error).__name__}: {error}"
        self._log.event("warning", stage="run", message=message)


def tracked(record: Record) -> tuple[str, int, dict[str, float]] | None:
    """Stage, step and numbers that a record has for a tracker; accuracies are numbers of the model's stage."""
    if isinstance(record.get("metrics"), dict) and isinstance(record.get("stage"), str) and "event" not in record:
        numbers = {name: float(value) for name, value in record["metrics"].items() if is_number(value)}
        return record["stage"], int(record.get("step") or 0), numbers
    held_out = record.get("event") == "evaluated" and record.get("split", "holdout") == "holdout"
    if held_out and is_number(record.get("pass@1")):
        return "accuracy", 0, {f"{record.get('model')}/{record.get('domain')}": float(record["pass@1"])}
    return None


class RecordExport:
    """Sets Ray's metrics by records."""

    def __init__(self, exporter: Exporter) -> None:
        self._to = exporter

    def pending(self, stages: list[str]) -> None:
        """These are to come."""
        for stage in stages:
            self._to.set("posttrain_stage_state", 0, stage=stage)

    def take(self, record: Record, past: bool = False) -> None:
        """Set what a record says; one of the past changes no counter and no histogram."""
        if "event" in record:
            self._event(record, past)
        elif isinstance(record.get("metrics"), dict) and isinstance(record.get("stage"), str):
            self._step(record, {key: value for key, value in record["metrics"].items() if is_number(value)}, past)
        if record.get("warning") or record.get("event") == "warning":
            self._to.count("posttrain_warnings", 0 if past else 1)

    def _step(self, record: Record, metrics: dict[str, float], past: bool) -> None:
        stage = record["stage"]
        for key in ("step", "steps"):
            if is_number(record.get(key)):
                self._to.set(f"posttrain_{key}", record[key], stage=stage)
        for key, value in metrics.items():
            name, _, part = key.partition("/")
            if key in BY_STAGE:
                self._to.set(BY_STAGE[key], value, stage=stage)
            elif name in BY_PART:
                self._to.set(BY_PART[name], value, stage=stage, part=part)
        seconds = metrics.get("seconds_step", 0.0)
        if seconds > 0 and "seconds_generate" in metrics:
            self._to.set("posttrain_trainer_idle_share", metrics["seconds_generate"] / seconds, stage=stage)
        if past:
            return
        self._to.count("posttrain_tokens", metrics.get("tokens_per_second", 0.0) * seconds, stage=stage)
        for phase in PHASES:
            self._to.count("posttrain_phase_seconds", metrics.get(f"seconds_{phase}", 0.0), stage=stage, phase=phase)
        if seconds:
            self._to.observe("posttrain_step_seconds", seconds, stage=stage)
        if "seconds_publish" in metrics:
            self._to.observe("posttrain_publish_seconds", metrics["seconds_publish"], stage=stage)

    def _event(self, record: Record, past: bool) -> None:
        name, stage = record["event"], str(record.get("stage"))
        if name in STATES:
            self._to.set("posttrain_stage_state", STATES[name], stage=stage)
            if name != "stage_started":
                self._to.end(stage)
        if name == "gate" and record.get("passed") is False and record.get("action") == "drop":
            self._to.set("posttrain_stage_state", DROPPED, stage=stage)
        if name == "evaluated" and tracked(record) is not None:
            labels = {"model": str(record.get("model")), "domain": str(record.get("domain"))}
            self._to.set("posttrain_accuracy", float(record["pass@1"]), **labels)
        if name == "resources" and not past:
            for kind in ("rss", "pss"):
                if is_number(record.get(f"{kind}_bytes")):
                    self._to.set("posttrain_memory_bytes", record[f"{kind}_bytes"], kind=kind)
