"""The metrics that a run's processes give to Ray, which shows them in its dashboard and serves them to Prometheus.

Ray puts `ray_` before a name and `_total` behind a counter's (`prometheus_names`). This module imports no Ray: that
happens when the first value is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Upper bounds of a histogram's buckets."""


@dataclass(frozen=True)
class Exported:
    """One metric. Every one has the label `run` beside `labels`."""

    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ("stage",)


PART = ("stage", "part")
"""`part` is empty for the whole, else a domain, a teacher or a part of the reward."""

EXPORTED = {
    # From the driver, by the records in metrics.jsonl.
    "posttrain_stage_state": Exported("gauge", "0 pending, 1 running, 2 finished, 3 failed, 4 dropped"),
    "posttrain_step": Exported("gauge", "Training steps done in the stage"),
    "posttrain_steps": Exported("gauge", "Training steps that the stage has"),
    "posttrain_loss": Exported("gauge", "Loss of the latest step"),
    "posttrain_learning_rate": Exported("gauge", "Learning rate of the latest step"),
    "posttrain_grad_norm": Exported("gauge", "Norm of the gradient in the latest step"),
    "posttrain_reward": Exported("gauge", "Mean reward of the latest step's samples", PART),
    "posttrain_kl": Exported("gauge", "Nats a token: to the teacher, or to GRPO's reference", PART),
    "posttrain_entropy": Exported("gauge", "Entropy of the policy on its own samples, nats a token", PART),
    "posttrain_completion_length": Exported("gauge", "Mean tokens of the latest step's samples", PART),
    "posttrain_tokens_per_second": Exported("gauge", "Tokens trained on a second, waiting included"),
    "posttrain_logprob_difference": Exported("gauge", "Largest |trainer - sampler| log-probability of the step"),
    "posttrain_staleness": Exported("gauge", "Mean age of the tokens learned from, in steps"),
    "posttrain_importance_ratio": Exported("gauge", "Mean ratio of the trainer's probability to the sampler's"),
    "posttrain_trainer_idle_share": Exported("gauge", "Share of the latest step in which the trainer waited"),
    "posttrain_teacher_busy_share": Exported("gauge", "Share of the latest step in which a teacher computed", PART),
    "posttrain_tokens": Exported("counter", "Tokens trained on"),
    "posttrain_phase_seconds": Exported("counter", "Trainer's time by phase", ("stage", "phase")),
    "posttrain_step_seconds": Exported("histogram", "Duration of training steps"),
    "posttrain_publish_seconds": Exported("histogram", "Duration of weight updates"),
    "posttrain_accuracy": Exported("gauge", "pass@1 on held-out problems", ("model", "domain")),
    "posttrain_warnings": Exported("counter", "Warnings of the run", ()),
    "posttrain_memory_bytes": Exported("gauge", "Memory of all processes of the run; kind is rss or pss", ("kind",)),
    # From the rollout service.
    "posttrain_rollout_samples": Exported(
        "gauge", "Unfinished samples, mean over the time; state is waiting or running", ("state",)
    ),
    "posttrain_rollout_groups_ready": Exported("gauge", "Finished groups that nobody has learned from yet", ()),
    "posttrain_rollout_workers": Exported("gauge", "Rollout workers that have weights", ()),
    "posttrain_rollout_deaths": Exported("counter", "Rollout workers that died or were replaced", ()),
    "posttrain_rollout_tokens": Exported("counter", "Tokens sampled", ("worker",)),
    "posttrain_rollout_tokens_per_second": Exported("gauge", "Tokens sampled a second", ("worker",)),
    "posttrain_rollout_idle_share": Exported("gauge", "Share of time in which the engine had no work", ("worker",)),
}


def prometheus_names() -> set[str]:
    """The names under which Prometheus finds the metrics."""
    names = set()
    for name, one in EXPORTED.items():
        endings = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}[one.kind]
        names |= {f"ray_{name}{ending}" for ending in endings}
    return names


LASTING = ("posttrain_stage_state", "posttrain_step", "posttrain_steps")
"""What is still true of a stage that has ended."""


class Exporter:
    """Gives one run's values to Ray. The process must be a driver or an actor of an initialised Ray.

    Ray serves a gauge for twice its report interval (20 s by default) after it was last set: `refresh` more often.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._made: dict[str, Any] = {}
        self._gauges: dict[tuple[str, tuple[str, ...]], tuple[float, dict[str, str]]] = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge's present value."""
        metric, complete = self._metric(name, "gauge"), self._labels(name, labels)
        metric.set(value, complete)
        self._gauges[name, tuple(complete.values())] = value, complete

    def refresh(self) -> None:
        """Set every gauge to its value once more."""
        for (name, _), (value, labels) in self._gauges.items():
            self._made[name].set(value, labels)

    def end(self, stage: str) -> None:
        """Refresh what was told of the latest step of a stage no longer."""
        self._gauges = {
            key: found for key, found in self._gauges.items() if found[1].get("stage") != stage or key[0] in LASTING
        }

    def count(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter; amounts that are not positive are passed over."""
        if amount > 0:
            self._metric(name, "counter").inc(amount, self._labels(name, labels))

    def observe(self, name: str, value: float, **labels: str) -> None:
        """One value of a histogram."""
        self._metric(name, "histogram").observe(value, self._labels(name, labels))

    def _metric(self, name: str, kind: str) -> Any:
        if name not in self._made:
            from ray.util import metrics

            one = EXPORTED[name]
            assert one.kind == kind, f"{name} is a {one.kind}"
            keys = ("run", *one.labels)
            if kind == "histogram":
                self._made[name] = metrics.Histogram(name, one.help, list(SECONDS), keys)
            else:
                self._made[name] = (metrics.Gauge if kind == "gauge" else metrics.Counter)(name, one.help, keys)
        return self._made[name]

    def _labels(self, name: str, labels: dict[str, str]) -> dict[str, str]:
        return {"run": self._run, **{key: labels.get(key, "") for key in EXPORTED[name].labels}}
