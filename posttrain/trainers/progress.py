"""Metrics of a training stage: one line of metrics.jsonl for each logged step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import RunFailed
from posttrain.observe.metrics import MetricsLog
from posttrain.observe.pulse import Pulse

NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy",
    "mean_token_accuracy": "token_accuracy",
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "zero_std_groups",
    "kl": "kl",
    "clip_ratio/region_mean": "clip_fraction",
    "cispo_clip_ratio": "clip_fraction",
    "sampling/importance_sampling_ratio/mean": "importance_ratio_mean",
}
"""TRL's names of what is reported, and ours. What TRL logs beyond them is dropped."""


class Progress(TrainerCallback):
    """Turns the trainer's logs into metrics lines, times the steps, and stops a run whose loss is not a number.

    `updates_per_step`: optimizer updates that count as one step of the stage. Metrics of our own (`add`) go into the
    same lines. `traces`: where single samples are written token by token (`posttrain.trainers.traces`).
    """

    def __init__(
        self,
        log: MetricsLog | None,
        stage: str,
        steps: int,
        updates_per_step: int = 1,
        traces: MetricsLog | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.log = log
        self.pulse = pulse
        self.traces = traces
        self.stage = stage
        self.steps = steps
        self.updates_per_step = updates_per_step
        self.last: dict[str, float] = {}
        self.tokens = 0
        self._own: dict[str, list[float]] = {}
        self._tokens_of_step = 0
        self._began = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """For a snapshot, which is written between two steps."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        self.tokens = state["tokens"]

    def phase(self, name: str) -> AbstractContextManager[None]:
        """What the trainer does in the block, if it is not learning; the watchdog wants to know."""
        return nullcontext() if self.pulse is None else self.pulse.phase(name)

    def add(self, name: str, value: float) -> None:
        """Note one value of the metric `name`; the line has the mean of a step's values."""
        self._own.setdefault(name, []).append(value)

    def add_tokens(self, count: int) -> None:
        """Note that `count` tokens were trained on."""
        self._tokens_of_step += count
        self.tokens += count

    def warn(self, message: str) -> None:
        """Put a warning into the run's log."""
        self.event("warning", message=message)

    def event(self, name: str, **fields: Any) -> None:
        """Note in the run's log that something happened in this stage."""
        if self.log is not None:
            self.log.event(name, stage=self.stage, **fields)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.pulse is not None:
            self.pulse.beat()
        if not logs or "loss" not in logs:  # the summary at the end of training
            return
        step = math.ceil(state.global_step / self.updates_per_step)
        if not math.isfinite(logs["loss"]):
            raise RunFailed(f"stage {self.stage}, step {step}: the loss is {logs['loss']}; try a lower `optimizer.lr`")
        metrics = {ours: logs[theirs] for theirs, ours in NAMES.items() if logs.get(theirs) is not None}
        metrics |= {name: sum(values) / len(values) for name, values in self._own.items()}
        now = time.perf_counter()
        metrics |= _seconds(metrics, now - self._began, self._tokens_of_step)
        self._began, self._tokens_of_step = now, 0
        self._own.clear()
        self.last = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if self.log is not None:
            self.log.write(self.stage, step, self.steps, self.last)


def _seconds(metrics: Mapping[str, float], elapsed: float, tokens: int) -> dict[str, float]:
    waited = sum(metrics.get(name, 0.0) for name in ("seconds_generate", "seconds_publish", "seconds_reward"))
    return {
        "seconds_step": elapsed,
        "seconds_train": max(0.0, elapsed - waited),
        "tokens_per_second": tokens / elapsed if elapsed > 0 else 0.0,
    }
