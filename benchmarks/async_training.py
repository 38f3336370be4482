"""`python -m benchmarks.async_training`: GRPO with asynchronous rollouts against synchronous ones, at equal samples.

One warm base model, then the same stage in each mode in turn, on the same processes: a trainer and the rollout workers
of a recipe. Who idles is taken from the first step to the last: the trainer while it waits for samples, the generators
while they wait for something to do. Writes async_training.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.warm_base import warm_base
from posttrain.files import atomic_write
from posttrain.observe.environment import describe_environment
from posttrain.observe.metrics import read_metrics
from posttrain.recipe import Recipe, load_recipe
from posttrain.recipe.evaluation import HoldoutEvaluation
from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import GrpoStage
from posttrain.stages.evaluate import measure_problems
from posttrain.stages.grpo import draw, prompts_of
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.work import Work
from posttrain.trainers.jobs import GrpoJob
from rollouts.pool import RolloutClient
from rollouts.worker import WorkerStats

MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "async, deterministic": {"mode": "async", "deterministic": True},
    "async, 1 step": {"mode": "async", "max_staleness": 1},
    "async, 3 steps": {"mode": "async", "max_staleness": 3},
}
"""What is compared: options of the recipe's `rollout` section."""
DOMAIN = "arithmetic"
POLL_SECONDS = 0.1


@dataclass
class Watch:
    """The generators' totals over time, while a stage runs."""

    client: RolloutClient
    readings: list[tuple[float, list[WorkerStats]]] = field(default_factory=list)
    """Unix seconds, and what each worker said."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Poll the workers in a thread."""
        over = threading.Event()
        thread = threading.Thread(target=self._poll, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _poll(self, over: threading.Event) -> None:
        while not over.wait(POLL_SECONDS):
            self.readings.append((time.time(), self.client.stats()))

    def found(self, begin: float, end: float, batch: int) -> dict[str, float]:
        """Between two moments (unix seconds): the share of time in which a generator had something to do, the share
        in which its engine made a step, and how much of its batch, `batch` samples, a step filled."""
        inside = [reading for reading in self.readings if begin <= reading[0] <= end]
        (first, before), (last, after) = inside[0], inside[-1]

        def grown(name: str) -> float:
            return sum(getattr(one, name) for one in after) - sum(getattr(one, name) for one in before)

        seconds = (last - first) * len(after)
        return {
            "generators_busy": 1 - grown("idle_seconds") / seconds,
            "generators_stepping": grown("busy_seconds") / seconds,
            "batch_filled": grown("tokens") / (grown("steps") * batch),
        }


def main() -> None:
    """Compare, print a table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.async_training", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny_v4.yaml"))
    parser.add_argument("--warmup", type=int, default=300, help="SFT steps of the base model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=64, help="prompts in one step, each answered 8 times")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--running", type=int, default=256, help="answers that a generator works on at once")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of async_training.json")
    arguments = parser.parse_args()
    results = compare(arguments)
    atomic_write(arguments.output / "async_training.json", json.dumps(results, indent=2) + "\n")
    show(results)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every mode with every seed, the modes in turn."""
    recipe = load_recipe(
        arguments.recipe,
        [
            f"cluster.rollout_workers={arguments.workers}",
            f"rollout.max_num_seqs={arguments.running}",
            "cluster.trainers=1",
            "cluster.dashboard=false",
            f"stages.base.steps={arguments.warmup}",
            *arguments.set,
        ],
    )
    with warm_base(recipe, DOMAIN) as (work, base):
        begin = accuracy(work, base, 1)
        runs = [
            {"mode": mode, "seed": seed, **measure(work, arguments, base, mode, seed)}
            for seed in range(arguments.seeds)
            for mode in arguments.modes
        ]
    return {
        "schema": 1,
        "environment": describe_environment(),
        "settings": vars(arguments) | {"recipe": str(arguments.recipe), "output": str(arguments.output)},
        "accuracy_before": begin,
        "runs": runs,
    }


def measure(work: Work, arguments: argparse.Namespace, base: Path, mode: str, seed: int) -> dict[str, Any]:
    """One stage from the base model: how long it took, who waited, what was learned."""
    import ray

    (original,) = (stage for stage in work.recipe.expert_stages(DOMAIN) if isinstance(stage, GrpoStage))
    config = original.model_copy(update={"steps": arguments.steps, "prompts_per_step": arguments.prompts})
    stage = f"grpo/{seed}"  # the same in every mode: the same random numbers
    problems = draw(work, stage, DOMAIN, config.steps * config.prompts_per_step)
    client = work.cluster.client()
    job = GrpoJob(
        stage=stage,
        config=config,
        checkpoint=str(base),
        output=str(work.run.path / "checkpoints" / f"{seed}-{list(MODES).index(mode)}"),
        prompts=prompts_of(work, problems),
        max_new_tokens=work.recipe.domains[DOMAIN].max_new_tokens,
        reward=DomainRewards(work.recipe, str(work.run.tokenizer_path), problems),
        rollout=RolloutConfig(**(work.recipe.rollout.model_dump() | MODES[mode])),
    )
    watch, started = Watch(client), time.time()
    with watch.running():
        result = ray.get(work.cluster.trainers[0].grpo.remote(job, client))
    lines = [one for one in read_metrics(work.run.path / "metrics.jsonl") if "step" in one and one["time"] > started]
    begin, end = lines[0]["time"], lines[-1]["time"]
    waited = sum(one["metrics"]["seconds_generate"] for one in lines[1:])
    version = (client.weight_version() or 0) + 1
    return {
        "seconds": end - begin,
        "trainer_waits": waited / (end - begin),
        **watch.found(begin, end, arguments.running),
        "tokens": result.tokens,
        "off_policy": result.off_policy,
        "largest_difference": result.max_abs_logprob_diff,
        "accuracy": accuracy(work, Path(result.checkpoint), version),
    }


def accuracy(work: Work, checkpoint: Path, version: int, domain: str = DOMAIN) -> float:
    """pass@1 on the held-out problems."""
    recipe: Recipe = work.recipe
    problems = work.domains[domain].holdout
    client = work.cluster.client()
    client.load_checkpoint(checkpoint, version)
    rewards = DomainRewards(recipe, str(work.run.tokenizer_path), problems)
    return measure_problems(recipe, client, work.tokenizer, problems, rewards, HoldoutEvaluation()).accuracy


def show(results: dict[str, Any]) -> None:
    """Medians over the seeds, with ranges in brackets."""
    by_mode = {mode: [run for run in results["runs"] if run["mode"] == mode] for mode in results["settings"]["modes"]}
    first = {run["seed"]: run["seconds"] for run in next(iter(by_mode.values()))}
    print(f"accuracy before: {100 * results['accuracy_before']:.1f} %")
    columns = [
        "mode",
        "seconds",
        f"{next(iter(by_mode))} / this",
        "trainer waits",
        "generators busy",
        "stepping",
        "batch filled",
        "mean age",
        "after",
    ]
    print(f"| {' | '.join(columns)} |")
    print(f"|{' --- |' * len(columns)}")
    for mode, runs in by_mode.items():
        cells = [
            spread([run["seconds"] for run in runs], "{:.1f}"),
            spread([first[run["seed"]] / run["seconds"] for run in runs], "{:.2f}"),
            spread([100 * run["trainer_waits"] for run in runs], "{:.0f} %"),
            spread([100 * run["generators_busy"] for run in runs], "{:.0f} %"),
            spread([100 * run["generators_stepping"] for run in runs], "{:.0f} %"),
            spread([100 * run["batch_filled"] for run in runs], "{:.0f} %"),
            spread([run["off_policy"]["staleness_mean"] for run in runs], "{:.2f}"),
            spread([100 * run["accuracy"] for run in runs], "{:.1f} %"),
        ]
        print(f"| {mode} | " + " | ".join(cells) + " |")


def spread(values: list[float], form: str) -> str:
    """`median [lowest–highest]`."""
    return f"{form.format(statistics.median(values))} [{form.format(min(values))}–{form.format(max(values))}]"


if __name__ == "__main__":
    main()
