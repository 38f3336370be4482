"""metrics.jsonl: what happened in a run, one JSON object a line, written by any process of one machine.

Every record has `time` (unix seconds). A training step is

    {"time", "stage", "step", "steps", "metrics": {"loss", "reward", "kl", "entropy", "completion_length",
                                                   "logprob_diff_max", ...}}

with `<metric>/<domain>` where a metric is kept by domain (the student's `kl/arithmetic`). An event is
{"time", "event", ...}; the report, the live view and `posttrain status` understand

    run_started        environment (of `posttrain.observe.environment.describe_environment`)
    run_finished       status ("finished", "failed", "interrupted"), error
    stage_started      stage, steps; a repeated start forgets the stage's earlier steps, or with `step` those after it
    stage_finished     stage, seconds, steps, checkpoint
    stage_failed       stage, error
    stage_reset        stage; it is done anew: measurements and gates of it count no longer
    evaluated          stage, model, checkpoint, domain, "pass@1", n, samples, ci95 [low, high], mean_length, seconds;
                       `split` other than "holdout" is shown in passing and never reported as a result
    gate               stage, domain, metric, parent, value, gain, min_gain, passed, action
    rollout_stats      stage, max_abs_logprob_diff, k3, weight_sync_seconds [..], tokens, seconds (of sampling; without
                       them from the steps' tokens_per_second, seconds_step and seconds_generate), trainer_idle and
                       generators_idle (shares of the time), off_policy (as `posttrain.trainers.mismatch.Ages` says)
    dashboard          address, metrics (the address that Prometheus reads)
    weights_published  stage, version, seconds
    queues             waiting, running (samples), ready_groups, workers, deaths, tokens_per_second, generators_idle:
                       how the rollout service stands, every few seconds while it works
    resources          peak_rss_bytes, peak_pss_bytes, rss_bytes, pss_bytes, peak_by_process_kind, cpu_seconds,
                       cpu_seconds_by_process_kind
    sample             model, domain, prompt, completion, reference, correct
    warning            message, stage
    snapshot           stage, step, bytes, seconds
    stuck              actor, phase, seconds, queues, action, message, stacks (of Python, as text)
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def plain_json(value: Any, where: str = "", non_finite: list[str] | None = None) -> Any:
    """`value` as JSON can hold it: array scalars become numbers, paths text, NaN and infinities None.

    The dotted keys of what was not finite are appended to `non_finite`.
    """
    if isinstance(value, Mapping):
        return {
            str(key): plain_json(item, f"{where}.{key}" if where else str(key), non_finite)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{where}[{index}]", non_finite) for index, item in enumerate(value)]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, float) and hasattr(value, "tolist"):  # a scalar or an array of numpy or torch
        return plain_json(value.tolist(), where, non_finite)
    number = float(value)
    if math.isfinite(number):
        return number
    if non_finite is not None:
        non_finite.append(where)
    return None


class MetricsLog:
    """Appends records to `path`. May be sent to other processes (Ray actors); each opens the file for itself.

    A line is one `write` on a descriptor opened with O_APPEND, which the kernel does not interleave with
    others' on a local file system. Half of it may be visible to others meanwhile, so it is written under a shared
    lock, and a process that opens the file looks for a torn line under an exclusive one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None

    def write(self, stage: str, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """Record `metrics` of step `step` (1-based) of `steps`. A value that is not finite is written as null."""
        self._append({"stage": stage, "step": int(step), "steps": int(steps), "metrics": metrics})

    def event(self, name: str, /, **fields: Any) -> None:
        """Record that `name` happened; see the module's table for the fields that are understood."""
        self._append({"event": name, **fields})

    def close(self) -> None:
        """Close the file; a later record opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, fields: Record) -> None:
        non_finite: list[str] = []
        record = plain_json({"time": time.time(), **fields}, non_finite=non_finite)
        if non_finite:
            record.setdefault(
                "warning", "not finite: " + ", ".join(name.removeprefix("metrics.") for name in non_finite)
            )
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        if self._descriptor is None:
            self._descriptor = self._open()
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        try:
            written = os.write(self._descriptor, line)
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        if written != len(line):
            self.close()  # the next record starts on a line of its own
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # no line is being written: what is torn stays so
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.write(descriptor, b"\n")  # a killed writer's torn line must not swallow ours
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_descriptor": None}


class MetricsFollower:
    """Reads what was appended to `path` since the last call. The file need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offset = 0

    def new_records(self) -> list[Record]:
        """The complete new lines, parsed; lines torn by a killed writer are left out."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole, newline, _ = data.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [record for line in whole.split(b"\n") if (record := _parse(line)) is not None]


def read_metrics(path: str | Path) -> list[Record]:
    """Every record of `path` in the order of writing; [] without the file. Torn lines are left out."""
    return MetricsFollower(path).new_records()


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # blank or torn, or cut inside a character
        return None
    return record if isinstance(record, dict) else None
