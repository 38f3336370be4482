"""`python -m benchmarks.monitoring [RECIPE]`: what looking at a run costs it. Writes monitoring.json.

A whole run, with every tracker and Ray's dashboard. On a machine that is busy, what monitoring takes from a run is
processor time, and that can be told apart however much else the machine does:

- the driver's threads that follow the run (live view, trackers and Ray's metrics, resources), by the kernel's account;
- what the other processes do for it: records, traces and gauges, counted in the run and timed one by one afterwards;
- Ray's dashboard, a process of its own.

Shares are of the processor time of all processes from the first training step to the last, in which the start-up
of processes does not count, of what the machine's cores had to give in that time, and of the whole run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from posttrain.files import atomic_write
from posttrain.observe.environment import describe_environment
from posttrain.observe.metrics import MetricsLog, Record, read_metrics
from posttrain.observe.progress import DRAW_SECONDS, KEPT_STEPS, live_table
from posttrain.observe.resources import TICKS_PER_SECOND
from posttrain.observe.runview import RunView
from posttrain.observe.trackers import TRACKERS
from posttrain.recipe import Recipe, load_recipe
from posttrain.rundir import RunDirectory

THREADS = ("live-progress", "tracking", "resource-monitor")
DASHBOARD = "Ray dashboard"
REPEATS = 300
AIM = 0.02


def main() -> None:
    """Run the recipe once; ten minutes with the default, two with recipes/tiny_v4_fast.yaml."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitoring", description=__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/tiny_v4.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/bench/monitoring.json"))
    arguments = parser.parse_args()
    results = measure(load_recipe(arguments.recipe, [f"trackers={json.dumps(list(TRACKERS))}"]))
    atomic_write(arguments.output, json.dumps({**results, "environment": describe_environment()}, indent=2) + "\n")
    for name, seconds in results["seconds"].items():
        print(f"{name:40} {seconds:8.2f} s {seconds / results['training_cpu_seconds']:8.2%} of the training")
    print(f"all monitoring while training: {results['share_training']:.2%} (the aim is {AIM:.0%})")
    print(f"of the machine's {os.cpu_count()} cores in that time: {results['share_machine']:.2%}")
    print(f"all monitoring in the whole run: {results['share_run']:.2%}")


def measure(recipe: Recipe) -> dict[str, Any]:
    """Seconds of processor time by what was done, and their shares."""
    from posttrain import pipeline

    with tempfile.TemporaryDirectory() as scratch, RunDirectory.create(scratch, "monitored", recipe) as run:
        with thread_seconds() as readings:
            pipeline.run(recipe, run)
        records = read_metrics(run.path / "metrics.jsonl")
        traces = read_metrics(run.path / "traces.jsonl")
        costs = {
            "records": len(records) * seconds_each(_writer(Path(scratch) / "timed.jsonl", _longest(records))),
            "traces": len(traces) * seconds_each(_writer(Path(scratch) / "timed.jsonl", _longest(traces))),
            "drawing on a terminal": _drawing_seconds(recipe, records),
        }
    begin, end = _training(records)
    resources = [record for record in records if record.get("event") == "resources"]
    dashboard = {time: found.get(DASHBOARD, 0.0) for time, found in _by_kind(resources)}
    threads = {name: _between([(at, found.get(name, 0.0)) for at, found in readings], begin, end) for name in THREADS}
    seconds = {**threads, DASHBOARD: _between(list(dashboard.items()), begin, end), **costs}
    total = [(record["time"], record["cpu_seconds"]) for record in resources]
    training, whole = _between(total, begin, end), total[-1][1]
    last = {**readings[-1][1], DASHBOARD: list(dashboard.values())[-1], **costs}
    return {
        "seconds": seconds,
        "training_cpu_seconds": training,
        "training_wall_seconds": end - begin,
        "run_cpu_seconds": whole,
        "share_training": sum(seconds.values()) / training,
        "share_machine": sum(seconds.values()) / (end - begin) / (os.cpu_count() or 1),
        "share_run": sum(last.values()) / whole,
        "records": len(records),
        "traces": len(traces),
    }


@contextmanager
def thread_seconds() -> Iterator[list[tuple[float, dict[str, float]]]]:
    """Unix time and the processor seconds of the threads in THREADS, every half a second of the `with` block."""
    readings: list[tuple[float, dict[str, float]]] = []
    over = threading.Event()

    def read() -> None:
        while not over.wait(0.5):
            found = dict(readings[-1][1]) if readings else {}
            for thread in threading.enumerate():
                if thread.name in THREADS and thread.native_id is not None:
                    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
                    found[thread.name] = (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
            readings.append((time.time(), found))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield readings
    finally:
        over.set()
        reader.join()


def seconds_each(do: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    do()
    begin = time.thread_time()
    for _ in range(REPEATS):
        do()
    return (time.thread_time() - begin) / REPEATS


def _writer(path: Path, record: Record) -> Callable[[], object]:
    log, fields = MetricsLog(path), {key: value for key, value in record.items() if key not in ("time", "event")}
    return lambda: log.event("timed", **fields)


def _longest(records: list[Record]) -> Record:
    return max(records, key=lambda record: len(json.dumps(record)), default={})


def _drawing_seconds(recipe: Recipe, records: list[Record]) -> float:
    """Of all tables that are drawn on a terminal from the first training step to the last."""
    view = RunView(recipe.stage_names(), keep_steps=KEPT_STEPS)
    for record in records:
        view.add(record)
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    begin, end = _training(records)
    return (end - begin) / DRAW_SECONDS * seconds_each(lambda: console.print(live_table(view, end, 140)))


def _training(records: list[Record]) -> tuple[float, float]:
    """Unix times of the first training step and the last."""
    times = [record["time"] for record in records if "metrics" in record and "event" not in record]
    return times[0], times[-1]


def _by_kind(resources: list[Record]) -> list[tuple[float, dict[str, float]]]:
    return [(record["time"], record["cpu_seconds_by_process_kind"]) for record in resources]


def _between(readings: list[tuple[float, float]], begin: float, end: float) -> float:
    """How much a total has grown between two times, by the readings nearest to them."""

    def at(moment: float) -> float:
        return min(readings, key=lambda reading: abs(reading[0] - moment))[1]

    return at(end) - at(begin)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
