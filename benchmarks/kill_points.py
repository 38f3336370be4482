"""`python -m benchmarks.kill_points [--points N]`: SIGKILL at random moments of a run, and the same final weights.

A tiny run of every kind of stage is done once undisturbed, then again while this program kills its driver, one of its
actors, or all of them at once, at N moments; whenever the run has ended, `posttrain resume` goes on with it. Every
checkpoint must have the bytes of the undisturbed run's, and every step the loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from posttrain.files import atomic_write
from posttrain.observe.metrics import read_metrics

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny_v4_fast.yaml"
SETTINGS = (
    "cluster={trainers: 1, rollout_workers: 2, teacher_workers: 1, dashboard: false}",
    "rollout.mode=async",
    "rollout.deterministic=true",
    "stages.base.steps=20",
    "stages.experts.per_domain[0].steps=20",
    "stages.experts.per_domain[1].steps=6",
    "stages.student.steps=20",
    "evaluation=[{holdout: {n: 16}}]",
    "snapshots={every: 2}",
)
SHARES = {
    "driver": 0.25,
    "TrainerActor": 0.25,
    "RolloutWorker": 0.2,
    "RolloutService": 0.1,
    "TeacherWorker": 0.1,
    "everything": 0.1,
}
"""Of the kills; actors by their classes."""
EARLY = 0.2
"""The share of lives that may end before the run samples again: until then there is little but a driver to kill."""
DELAY_SECONDS = 1.5
"""At most, from a step to the kill that it is the moment of: steps are not all that a run does."""
GONE_SECONDS = 180.0
"""How long the processes of a killed driver may take to end: Ray's agents, killed while they start, look for their
raylet for longer than a minute before they give up."""


def main() -> None:
    """Both runs; a difference is an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_points", description=__doc__)
    parser.add_argument("--points", type=int, default=50, help="moments to kill something at")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/kill_points"), help="directory; it is emptied")
    arguments = parser.parse_args()
    results = run(arguments.output, arguments.recipe, arguments.points, arguments.seed)
    atomic_write(arguments.output / "kill_points.json", json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if not results["identical"]:
        raise SystemExit(1)


def run(output: Path, recipe: Path, points: int, seed: int) -> dict[str, Any]:
    """The undisturbed run, the disturbed one, and how they compare."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    begin = time.monotonic()
    quiet = Driver(output, "undisturbed", recipe)
    if quiet.process.wait() != 0:
        raise RuntimeError(f"the undisturbed run failed: see {quiet.log}")
    quiet_seconds = time.monotonic() - begin
    total = len(losses(quiet.run))
    chance = random.Random(seed)
    moments = sorted(chance.randrange(1, total * 19 // 20) for _ in range(points))
    begin = time.monotonic()
    killed, resumes = disturb(output, recipe, moments, chance)
    expected, found = (checkpoints(output / name) for name in ("undisturbed", "disturbed"))
    different = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    one, other = losses(output / "undisturbed"), losses(output / "disturbed")
    return {
        "points": points,
        "killed": dict(killed),
        "resumes": resumes,
        "steps": total,
        "undisturbed_seconds": round(quiet_seconds, 1),
        "disturbed_seconds": round(time.monotonic() - begin, 1),
        "final_sha256": digest(expected),
        "disturbed_final_sha256": digest(found),
        "different_files": different,
        "steps_with_another_loss": sum(one[step] != other.get(step) for step in one),
        "identical": not different and one == other,
    }


def disturb(output: Path, recipe: Path, moments: list[int], chance: random.Random) -> tuple[Counter[str], int]:
    """Run until the end, killing at the moments.

    Returns:
        What was killed, and how often the run was gone on with.
    """
    killed: Counter[str] = Counter()
    driver, resumes = Driver(output, "disturbed", recipe), 0
    left, early = list(moments), True
    while (code := driver.process.poll()) != 0:
        if code is not None:
            driver.wait_until_gone()
            driver, resumes, early = Driver(output, "disturbed"), resumes + 1, chance.random() < EARLY
        if left and len(losses(driver.run)) >= left[0] and (early or driver.victims("RolloutWorker")):
            time.sleep(chance.uniform(0, DELAY_SECONDS))
            (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
            if driver.kill(kind, chance):
                killed[kind] += 1
                left.pop(0)
                print(f"{killed.total()}: {kind} at step {len(losses(driver.run))}, life {resumes + 1}", flush=True)
        time.sleep(0.1)
    if left:
        raise RuntimeError(f"the run was over before {len(left)} of its kills")
    return killed, resumes


class Driver:
    """A `posttrain run`, or a `posttrain resume`, in a process group of its own."""

    def __init__(self, output: Path, name: str, recipe: Path | None = None) -> None:
        """Without a recipe the run of that name is gone on with."""
        self.run, self.log = output / name, output / f"{name}.log"
        words = ["resume", str(self.run)]
        if recipe is not None:
            settings = [part for setting in SETTINGS for part in ("--set", setting)]
            words = ["run", str(recipe), "--name", name, "--runs-dir", str(output), *settings]
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "posttrain", *words]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self._known: set[psutil.Process] = set()

    def kill(self, kind: str, chance: random.Random) -> bool:
        """Kill something of this kind; False when there is none now."""
        victims = self.victims(kind)
        if victims and kind != "everything":
            victims = [chance.choice(victims)]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        return bool(victims)

    def victims(self, kind: str) -> list[int]:
        """The processes of a kind."""
        with suppress(psutil.NoSuchProcess):
            self._known = set(psutil.Process(self.process.pid).children(recursive=True))
        if kind == "driver":
            return [self.process.pid]
        if kind == "everything":
            return [self.process.pid, *(child.pid for child in self._known)]
        return [child.pid for child in self._known if is_actor(child, kind)]

    def wait_until_gone(self) -> None:
        """Wait for the end of what a driver that was killed had started."""
        _, left = psutil.wait_procs(self._known, timeout=GONE_SECONDS)
        if left:
            raise RuntimeError(f"processes of a killed run are still there: {left}")


def is_actor(process: psutil.Process, kind: str) -> bool:
    """Whether it runs a Ray actor of this class."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
        return process.cmdline()[0].startswith(f"ray::{kind}")
    return False


def losses(run: Path) -> dict[tuple[str, int], Any]:
    """The last that was recorded of each step of each stage."""
    found = [record for record in read_metrics(run / "metrics.jsonl") if "metrics" in record]
    return {(record["stage"], record["step"]): record["metrics"].get("loss") for record in found}


def checkpoints(run: Path) -> dict[str, str]:
    """The SHA-256 of every file of every checkpoint."""
    root = run / "checkpoints"
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def digest(files: dict[str, str]) -> str:
    """One hash of the student's files."""
    student = sorted((name, value) for name, value in files.items() if name.startswith("student/"))
    return hashlib.sha256(json.dumps(student).encode()).hexdigest()


if __name__ == "__main__":
    main()
