"""What a run has done so far, put together from its metrics records: shared by live view, status and report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from posttrain.observe.metrics import Record

StageStatus = Literal["pending", "given", "running", "finished", "failed", "interrupted", "dropped"]
"""`given`: evaluated without having been trained, the initial weights as base. `dropped`: by its gate."""

STATUS_MARKS = {
    "pending": "·",
    "given": "✓",
    "running": "▶",
    "finished": "✓",
    "failed": "✗",
    "interrupted": "!",
    "dropped": "–",
}


@dataclass
class StageView:
    """One stage. Times are unix seconds, durations seconds."""

    name: str
    status: StageStatus = "pending"
    step: int = 0
    steps: int = 0
    started: float | None = None
    ended: float | None = None
    last_time: float | None = None
    """Time of the last record."""
    seconds_reported: float | None = None
    checkpoint: str | None = None
    error: str | None = None
    history: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)
    """(step, time, metrics), one entry a step; metrics without a number (null) are left out."""

    @property
    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        return {key: value for _, _, metrics in self.history for key, value in metrics.items()}

    def seconds(self, now: float | None = None) -> float | None:
        """How long the stage took, or has been running at `now` (default: its last record)."""
        if self.seconds_reported is not None:
            return self.seconds_reported
        end = self.ended or now or self.last_time
        return None if self.started is None or end is None else max(0.0, end - self.started)

    def steps_per_second(self, window: int = 20) -> float | None:
        """The rate over the last `window` steps; None before the second."""
        recent = self.history[-window:]
        if len(recent) < 2 or recent[-1][1] <= recent[0][1]:
            return None
        return (recent[-1][0] - recent[0][0]) / (recent[-1][1] - recent[0][1])

    def seconds_left(self, now: float) -> float | None:
        """Expected remaining seconds of a running stage, from its recent rate."""
        rate = self.steps_per_second()
        if not rate or rate <= 0 or self.last_time is None:
            return None
        return max(0.0, (self.steps - self.step) / rate - (now - self.last_time))


class RunView:
    """Takes records in order (`add`) and holds the state of every stage, and the events by name."""

    def __init__(self, stages: Iterable[str] = (), keep_steps: int | None = None) -> None:
        """`stages`: the planned ones, in order. `keep_steps`: how much history each stage keeps (default: all)."""
        self.stages: dict[str, StageView] = {name: StageView(name) for name in stages}
        self.events: dict[str, list[Record]] = {}
        self.evaluations: dict[tuple[str, str], Record] = {}
        """(model, domain) -> its last held-out `evaluated` event."""
        self.attempts: list[tuple[float, float]] = []
        """(start, last record) of every start of this run."""
        self.warnings: list[str] = []
        self._attempt_open = False
        self._keep_steps = keep_steps

    @classmethod
    def of(cls, records: Iterable[Record], stages: Iterable[str] = ()) -> RunView:
        """The view after all `records`."""
        view = cls(stages)
        for record in records:
            view.add(record)
        return view

    @property
    def finish(self) -> Record | None:
        """The `run_finished` event of the last attempt, None while it runs or when it was killed."""
        finishes = self.events.get("run_finished", [])
        starts = self.events.get("run_started", [])
        if not finishes or (starts and record_time(starts[-1]) > record_time(finishes[-1])):
            return None
        return finishes[-1]

    @property
    def seconds(self) -> float | None:
        """Wall seconds of all attempts together, without the pauses between them."""
        return sum(end - start for start, end in self.attempts) if self.attempts else None

    def accuracy(self, model: str) -> dict[str, float]:
        """The held-out accuracy of `model` by domain."""
        return {domain: event["pass@1"] for (of, domain), event in self.evaluations.items() if of == model}

    def stage(self, name: str) -> StageView:
        """The stage of that name; a new one appears behind the planned ones."""
        return self.stages.setdefault(name, StageView(name))

    def add(self, record: Record) -> None:
        """Take one record of metrics.jsonl. Fields of an unexpected type are passed over, not fatal."""
        time, name = record_time(record), record.get("event")
        self._count_time(time, name)
        if isinstance(name, str):
            self._keep_event(name, record)
            self._add_event(name, record, time)
        elif isinstance(record.get("metrics"), dict) and isinstance(record.get("stage"), str):
            self._add_step(record, time)
        if isinstance(record.get("warning"), str):
            self.warnings.append(f"{record.get('stage', 'run')} step {record.get('step', '?')}: {record['warning']}")

    def _keep_event(self, name: str, record: Record) -> None:
        """All of them; for a live view of the frequent ones the latest alone."""
        kept = self.events.setdefault(name, [])
        if self._keep_steps is not None and name in ("sample", "queues", "resources"):
            kept.clear()
        kept.append(record)

    def _count_time(self, time: float, event: Any) -> None:
        """Extend the running attempt; what is appended after a run's end (a later `posttrain eval`) is not its time."""
        if event == "run_started" or not self.attempts:
            self.attempts.append((time, time))
            self._attempt_open = True
        elif self._attempt_open:
            self.attempts[-1] = (self.attempts[-1][0], max(time, self.attempts[-1][1]))
        if event == "run_finished":
            self._attempt_open = False

    def _add_step(self, record: Record, time: float) -> None:
        stage = self.stage(record["stage"])
        stage.step, stage.steps = _whole(record.get("step")), _whole(record.get("steps")) or stage.steps
        stage.last_time = time
        if stage.started is None:
            stage.started = time
        if stage.status != "finished":
            stage.status = "running"
        metrics = {key: float(value) for key, value in record["metrics"].items() if is_number(value)}
        if stage.history and stage.history[-1][0] == stage.step:
            metrics = {**stage.history.pop()[2], **metrics}
        stage.history.append((stage.step, time, metrics))
        if self._keep_steps is not None:
            del stage.history[: -self._keep_steps]

    def _add_event(self, name: str, record: Record, time: float) -> None:
        if name in ("run_started", "run_finished"):
            self._end_running_stages("interrupted", time)
        if name == "stuck":
            self.warnings.append(f"watchdog: {record.get('message', '')}")
        if name == "warning":
            self.warnings.append(f"{record.get('stage', 'run')}: {record.get('message', '')}")
        if name == "evaluated" and record.get("split", "holdout") == "holdout" and is_number(record.get("pass@1")):
            model = str(record.get("model", record.get("stage")))
            self.evaluations[model, str(record.get("domain"))] = record
            if model in self.stages and self.stages[model].status == "pending":
                self.stages[model].status = "given"
        if name == "gate" and record.get("passed") is False:
            stage, gain, needed = str(record.get("stage")), record.get("gain"), record.get("min_gain")
            values = ""
            if is_number(gain) and is_number(needed):
                values = f": it gained {100 * gain:.1f} of {100 * needed:.1f} points"
            self.warnings.append(f"{stage} did not pass its gate{values}")
            if record.get("action") == "drop":
                self.stage(stage).status = "dropped"
        if isinstance(record.get("stage"), str) and name.startswith("stage_"):
            self._change_stage(name, self.stage(record["stage"]), record, time)

    def _change_stage(self, name: str, stage: StageView, record: Record, time: float) -> None:
        stage.last_time = time
        if name == "stage_started":
            kept = _whole(record.get("step"))
            stage.history = [entry for entry in stage.history if entry[0] <= kept]
            stage.status, stage.started, stage.ended, stage.step = "running", time, None, kept
            stage.steps = _whole(record.get("steps"))
            stage.seconds_reported, stage.error = None, None
        elif name == "stage_finished":
            stage.status, stage.ended = "finished", time
            stage.steps = _whole(record.get("steps")) or stage.steps
            stage.seconds_reported = float(record["seconds"]) if is_number(record.get("seconds")) else None
            checkpoint = record.get("checkpoint")
            stage.checkpoint = str(checkpoint) if checkpoint else None
        elif name == "stage_reset":
            stage.status, stage.history, stage.step = "pending", [], 0
        elif name == "stage_failed":
            stage.status, stage.ended, stage.error = "failed", time, str(record.get("error", "")) or None

    def _end_running_stages(self, status: StageStatus, time: float) -> None:
        for stage in self.stages.values():
            if stage.status == "running":
                stage.status, stage.ended = status, min(time, stage.last_time or time)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def record_time(record: Record) -> float:
    """When `record` was written (unix seconds); 0 for a record without a time."""
    time = record.get("time")
    return float(time) if is_number(time) else 0.0


def active_seconds(attempts: list[tuple[float, float]], time: float) -> float:
    """Seconds that the run had been working at `time`: pauses between attempts do not count."""
    return sum(max(0.0, min(end, time) - start) for start, end in attempts)


def _whole(value: Any) -> int:
    return int(value) if is_number(value) else 0
