"""`python -m benchmarks.rollout_soak [--minutes N]`: the rollout service under everything at once.

Workers and the service are killed, stopped and slowed down at random, workers come and go, the queue is always full,
groups are cancelled, weights are published while samples run. All the time every group that is not cancelled has to
come, once. Memory, processes, actors and file descriptors are recorded; at the end there must be no more of them than
after the start, and the log must be small.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ray._private.state import actors as all_actors

from benchmarks.rollout_kit import make_groups, rollout_pool, write_checkpoint
from posttrain.files import atomic_write
from rollouts.pool import RolloutPool

WORKERS = 2
QUEUE_SAMPLES = 256
STUCK_SECONDS = 8.0
WEIGHTS = {"kill a worker": 6, "kill the service": 1, "stop a worker": 2, "slow a worker": 3, "resize": 1, "publish": 4}
"""How often what happens."""
PAUSE_SECONDS = 6.0
"""Between two of these, on average."""
SETTLED_SECONDS = 30.0
GROWTH_BYTES = 200 << 20
"""By which memory may differ between start and end: a new process after a kill is not the same to the byte."""
LOG_BYTES = 64 << 20


def main() -> None:
    """Print what happened, write soak.json; fails if something was left behind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/soak"), help="directory; what is there goes")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    write_checkpoint(arguments.output)
    log = arguments.output / "log"
    options = {"queue_samples": QUEUE_SAMPLES, "stuck_seconds": STUCK_SECONDS}
    with rollout_pool(arguments.output, log, WORKERS, spares=1, **options) as pool:
        results = Soak(pool, arguments.output, arguments.seed).run(60 * arguments.minutes)
    atomic_write(arguments.output / "soak.json", json.dumps(results, indent=2) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "samples"}, indent=2))
    if results["problems"]:
        raise SystemExit("; ".join(results["problems"]))


class Soak:
    """One run: a consumer, a submitter, and whatever disturbs them."""

    def __init__(self, pool: RolloutPool, directory: Path, seed: int) -> None:
        self._pool = pool
        self._client = pool.client()
        self._directory = directory
        self._chance = random.Random(seed)
        self._over = threading.Event()
        self._happened: Counter[str] = Counter()
        self._wanted: set[str] = set()
        self._cancelled = 0
        self._consumed = 0
        self._version = 1
        self._failures: list[str] = []
        self._begin = time.monotonic()

    def run(self, seconds: float) -> dict[str, Any]:
        """Disturb for so long; then let it come to rest, and compare."""
        threads = [
            threading.Thread(target=self._guarded, args=(one,), daemon=True) for one in (self._submit, self._consume)
        ]
        self._settle()
        before = self._measure()
        for thread in threads:
            thread.start()
        samples = [before]
        while time.monotonic() - self._begin < seconds and not self._failures:
            time.sleep(self._chance.expovariate(1 / PAUSE_SECONDS))
            what = self._chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            with suppress(psutil.NoSuchProcess, ProcessLookupError, IndexError):
                self._do(what)
                self._happened[what] += 1
            samples.append(self._measure())
        self._over.set()
        for thread in threads:
            thread.join(300)
        self._pool.resize(WORKERS)
        self._settle()
        after = self._measure()
        stats = self._client.service_stats()
        return {
            "minutes": round((time.monotonic() - self._begin) / 60, 1),
            "happened": dict(self._happened),
            "consumed": self._consumed,
            "cancelled": self._cancelled,
            "stuck": stats.stuck,
            "before": before,
            "after": after,
            "problems": [*self._failures, *self._problems(before, after, stats)],
            "samples": samples,
        }

    def _problems(self, before: dict[str, int], after: dict[str, int], stats: Any) -> list[str]:
        problems = [f"{len(self._wanted)} groups never came"] if self._wanted else []
        if stats.running or stats.waiting or stats.ready_groups:
            problems.append(f"the service still has {stats}")
        for name in ("processes", "actors"):
            if after[name] != before[name]:
                problems.append(f"{after[name]} {name} at the end, {before[name]} at the start")
        if after["descriptors"] > before["descriptors"] + 20:
            problems.append(f"{after['descriptors']} open files at the end, {before['descriptors']} at the start")
        if after["bytes"] > before["bytes"] + GROWTH_BYTES:
            problems.append(f"{after['bytes'] >> 20} MiB at the end, {before['bytes'] >> 20} MiB at the start")
        if after["log_bytes"] > LOG_BYTES:
            problems.append(f"{after['log_bytes'] >> 20} MiB of log are left")
        return problems

    def _guarded(self, target: Any) -> None:
        try:
            target()
        except Exception as error:
            self._failures.append(f"{target.__name__}: {error!r}")

    def _submit(self) -> None:
        """More than the queue takes, all the time; and some are cancelled."""
        for round_number in range(1_000_000):
            if self._over.is_set():
                return
            groups = make_groups(64, 4, round_number, f"round{round_number}")
            self._wanted |= {group.id for group in groups}
            self._client.submit(groups)
            cancelled = [group.id for group in groups if self._chance.random() < 0.1]
            self._wanted -= set(cancelled)
            self._client.cancel(cancelled)
            self._cancelled += len(cancelled)

    def _consume(self) -> None:
        while not self._over.is_set() or self._wanted:
            for group in self._client.collect(8, timeout=1):
                if group.failure is not None:
                    raise RuntimeError(f"{group.request.id}: {group.failure}")
                if [len(one.token_ids) for one in group.completions] != [
                    len(one.versions) for one in group.completions
                ]:
                    raise RuntimeError(f"{group.request.id}: spans do not cover the tokens")
                self._client.acknowledge([group.request.id])
                if group.request.id in self._wanted:
                    self._wanted.remove(group.request.id)
                    self._consumed += 1

    def _do(self, what: str) -> None:
        stats = self._client.service_stats()
        if what == "kill the service":
            os.kill(stats.pid, signal.SIGKILL)
        elif what == "resize":
            self._pool.resize(self._chance.choice([1, 2, 3]))
        elif what == "publish":
            self._version += 1
            self._client.load_checkpoint(self._directory / "checkpoint", self._version)
        else:
            pid = self._chance.choice(list(stats.workers.values()))
            if what == "kill a worker":
                os.kill(pid, signal.SIGKILL)
            elif what == "stop a worker":
                os.kill(pid, signal.SIGSTOP)
            else:  # slow, but not stuck
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self._chance.uniform(0.5, STUCK_SECONDS / 2))
                os.kill(pid, signal.SIGCONT)

    def _settle(self) -> None:
        """Wait until all workers and the spare are there and nothing changes."""
        end = time.monotonic() + 120
        while len(self._client.service_stats().ready) < WORKERS and time.monotonic() < end:
            time.sleep(0.5)
        time.sleep(SETTLED_SECONDS)

    def _measure(self) -> dict[str, int]:
        """Of the service, its workers and this process."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "RolloutService" in (name := " ".join(process.cmdline())) or "RolloutWorker" in name:
                    found.append((process.memory_full_info().uss, process.num_fds()))
        actors = sum(actor["State"] != "DEAD" for actor in all_actors().values())
        log = [path.stat().st_size for path in (self._directory / "log").rglob("*") if path.is_file()]
        return {
            "seconds": round(time.monotonic() - self._begin),
            "processes": len(found),
            "actors": actors,
            "bytes": sum(size for size, _ in found),
            "descriptors": sum(count for _, count in found),
            "driver_bytes": psutil.Process().memory_info().rss,
            "log_bytes": sum(log),
        }


if __name__ == "__main__":
    main()
