"""`python -m benchmarks.rollout_kills [--kills N]`: SIGKILL at random moments, and the same training data.

A driver asks the rollout service for groups, appends each finished group to a file, and acknowledges it. It runs once
undisturbed; then it runs again while this program kills its workers, its service and itself, and starts it anew when it
died. Both files must have every group once, and be the same to the last bit of every log-probability.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rollout_kit import (
    data_line,
    kill_one,
    make_groups,
    read_lines,
    rollout_pool,
    write_checkpoint,
    write_processes,
)
from posttrain.files import atomic_write

SHARES = {"worker": 0.7, "service": 0.15, "driver": 0.15}
"""Of the kills."""
WINDOW = 48
"""Groups in progress at once."""
WATCH_SECONDS = 0.2


def main() -> None:
    """Run it, or with `--drive` be the driver."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--groups", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=4, help="of each group")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/kills"), help="directory; what is there goes")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive, Load(arguments.groups, arguments.samples, arguments.workers))
        return
    load = Load(arguments.groups, arguments.samples, arguments.workers)
    results = run(arguments.output, load, arguments.kills, arguments.seed)
    atomic_write(arguments.output / "kills.json", json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


@dataclass(frozen=True)
class Load:
    """What a driver does."""

    groups: int
    samples: int
    workers: int


def run(output: Path, load: Load, kills: int, seed: int) -> dict[str, Any]:
    """Both runs.

    Raises:
        RuntimeError: the data differ, or something else went wrong.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    write_checkpoint(output)
    quiet, disturbed = output / "undisturbed", output / "disturbed"
    begin = time.monotonic()
    wait(start(quiet, load))
    quiet_seconds = time.monotonic() - begin
    begin = time.monotonic()
    done, recovery_seconds = disturb(disturbed, load, kills, seed)
    seconds = time.monotonic() - begin
    expected, found = read_lines(quiet / "data.jsonl"), read_lines(disturbed / "data.jsonl")
    if len(expected) != load.groups or found.keys() != expected.keys():
        raise RuntimeError(f"{len(expected)} groups without and {len(found)} with kills; {load.groups} were asked for")
    if different := [name for name in expected if expected[name] != found[name]]:
        raise RuntimeError(f"{len(different)} groups differ: {different[:5]}")
    return {
        "kills": sum(done.values()),
        "killed": dict(done),
        "groups": load.groups,
        "samples": load.groups * load.samples,
        "undisturbed_seconds": round(quiet_seconds, 1),
        "disturbed_seconds": round(seconds, 1),
        "worker_recovery_seconds": {
            "count": len(recovery_seconds),
            "median": round(statistics.median(recovery_seconds or [0.0]), 1),
            "largest": round(max(recovery_seconds, default=0.0), 1),
        },
        "sha256": hashlib.sha256("\n".join(found[name] for name in sorted(found)).encode()).hexdigest(),
        "identical": True,
    }


def disturb(place: Path, load: Load, kills: int, seed: int) -> tuple[Counter[str], list[float]]:
    """Run drivers until the data are complete, killing meanwhile.

    Returns:
        What was killed, and the seconds from a worker's death to its replacement's being ready.
    """
    chance = random.Random(seed)
    # Random moments of the run's progress, so that there are as many kills however long a restart takes.
    moments = sorted(chance.randrange(load.groups * 19 // 20) for _ in range(kills))
    done: Counter[str] = Counter()
    recovery: dict[str, list[float]] = {}
    driver = start(place, load)
    while True:
        time.sleep(chance.uniform(0, 2 * WATCH_SECONDS))
        with suppress(FileNotFoundError):
            seen = json.loads((place / "processes.json").read_text())
            recovery[seen["epoch"]] = seen["recovery_seconds"]
        code = driver.poll()
        if code == 0:
            break
        if code is not None:
            if code != -9:
                raise RuntimeError(f"the driver ended with {code}: see {place / 'driver.log'}")
            driver = start(place, load)
            continue
        if moments and consumed(place) >= moments[0]:
            (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
            if kill_one(place / "processes.json", kind, chance):
                moments.pop(0)
                done[kind] += 1
    if moments:
        raise RuntimeError(f"the run was over with {len(moments)} kills to come")
    return done, [seconds for of_service in recovery.values() for seconds in of_service]


def drive(place: Path, load: Load) -> None:
    """One driver: goes on where the one before was killed."""
    data = place / "data.jsonl"
    before = read_lines(data)
    wanted = [group for group in make_groups(load.groups, load.samples) if group.id not in before]
    stopped = threading.Event()
    options = {"spares": load.workers - 1, "queue_samples": WINDOW * load.samples}
    with rollout_pool(place.parent, place / "log", load.workers, **options) as pool, data.open("a") as file:
        client, watcher = pool.client(), pool.client()

        def watch() -> None:
            while not stopped.wait(WATCH_SECONDS):
                write_processes(place / "processes.json", watcher)

        threading.Thread(target=watch, daemon=True).start()
        client.acknowledge(list(before))
        submitter = threading.Thread(target=lambda: client.submit(wanted), daemon=True)
        submitter.start()
        for _ in wanted:
            (group,) = client.collect(1)
            file.write(data_line(group) + "\n")
            file.flush()
            os.fsync(file.fileno())
            client.acknowledge([group.request.id])
        stopped.set()
        (place / "processes.json").unlink(missing_ok=True)


def consumed(place: Path) -> int:
    """How many groups a driver has consumed."""
    data = place / "data.jsonl"
    return data.read_bytes().count(b"\n") if data.exists() else 0


def start(place: Path, load: Load) -> subprocess.Popen[bytes]:
    """A driver."""
    place.mkdir(exist_ok=True)
    (place / "processes.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.rollout_kills", "--drive", str(place.resolve())]
    for name, value in asdict(load).items():
        command += [f"--{name}", str(value)]
    with (place / "driver.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def wait(driver: subprocess.Popen[bytes]) -> None:
    """Until it has ended as it should."""
    if driver.wait() != 0:
        raise RuntimeError(f"the driver ended with {driver.returncode}")


if __name__ == "__main__":
    main()
