"""What the rollout service says of itself while it works: to Ray's metrics, and as events in metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from posttrain.observe.exported import Exporter
from posttrain.observe.metrics import MetricsLog
from rollouts.worker import Report

MONITOR_SECONDS = 5.0


@dataclass(frozen=True)
class Queues:
    """The service at a moment, and since the moment before."""

    waiting: float
    """Samples in no engine, mean over the time: answers of a few tokens come and go between two moments."""
    running: float
    """Samples in engines, mean over the time."""
    ready_groups: int
    """Finished, and nobody has learned from them yet."""
    workers: int
    """With weights."""
    deaths: int
    """Of workers, since the service started."""


class Average:
    """The mean over time of a number that changes in steps.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._value = self._sum = 0.0
        self._begin = self._at = clock()

    def set(self, value: float) -> None:
        """From now on it is `value`."""
        now = self._clock()
        self._sum += self._value * (now - self._at)
        self._value, self._at = value, now

    def take(self) -> float:
        """The mean since the call before."""
        self.set(self._value)
        seconds = self._at - self._begin
        mean = self._sum / seconds if seconds > 0 else self._value
        self._sum, self._begin = 0.0, self._at
        return mean


class Monitor:
    """Compares what workers report with what they reported before.

    Args:
        log: The run's; the run is named by its directory.
    """

    def __init__(self, log: MetricsLog) -> None:
        self._log = log
        self._export = Exporter(log.path.parent.name)
        self._before: dict[int, tuple[int, Report]] = {}
        """Worker → its process and what it reported."""
        self._queues: Queues | None = None
        self._at = time.monotonic()

    def observe(self, queues: Queues, reports: Mapping[int, tuple[int, Report]]) -> None:
        """Export the state; write an event if something was sampled, or changed.

        Args:
            reports: Worker → process and latest report.
        """
        seconds = max(1e-9, time.monotonic() - self._at)
        self._at += seconds
        tokens, idle = 0, []
        for worker, (pid, report) in reports.items():
            known = self._before.get(worker)
            before = known[1] if known is not None and known[0] == pid else None
            new = report.tokens - (before.tokens if before else 0)
            waited = report.idle_seconds - (before.idle_seconds if before else 0.0)
            tokens += new
            idle.append(min(1.0, max(0.0, waited / seconds)))
            self._export.count("posttrain_rollout_tokens", new, worker=str(worker))
            self._export.set("posttrain_rollout_tokens_per_second", new / seconds, worker=str(worker))
            self._export.set("posttrain_rollout_idle_share", idle[-1], worker=str(worker))
        deaths = self._queues.deaths if self._queues is not None else 0
        self._export.set("posttrain_rollout_samples", queues.waiting, state="waiting")
        self._export.set("posttrain_rollout_samples", queues.running, state="running")
        self._export.set("posttrain_rollout_groups_ready", queues.ready_groups)
        self._export.set("posttrain_rollout_workers", queues.workers)
        self._export.count("posttrain_rollout_deaths", queues.deaths - deaths)
        if tokens or queues != self._queues:
            shares = {"generators_idle": sum(idle) / len(idle)} if idle else {}
            self._log.event("queues", **vars(queues), tokens_per_second=tokens / seconds, **shares)
        self._before, self._queues = dict(reports), queues
