"""`python -m benchmarks.grpo_options optimizers|objectives`: options of GRPO against each other, at equal samples.

One warm base model, then the same GRPO stage from it in each variant in turn, on the processes of a recipe. Writes
grpo_NAME.json (the mean reward of every step) and grpo_NAME.png. An interrupted comparison goes on where it was when it
is started again with the same settings: the base model comes out the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.async_training import accuracy
from benchmarks.sft_options import smooth, spread
from benchmarks.warm_base import warm_base
from posttrain.files import atomic_write
from posttrain.observe.environment import describe_environment
from posttrain.observe.metrics import read_metrics
from posttrain.recipe import load_recipe
from posttrain.recipe.stages import GrpoStage
from posttrain.stages.grpo import draw, prompts_of
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.work import Work
from posttrain.trainers.jobs import GrpoJob


def stage(name: str, rate: float, **options: Any) -> dict[str, Any]:
    """Options of the GRPO stage."""
    return {"optimizer": {"name": name, "lr": rate, "warmup_steps": 5}, **options}


def objective(loss_type: str, **options: Any) -> dict[str, Any]:
    """Options of the GRPO stage; two updates a batch, so that ratios differ from 1 and clipping has something to do."""
    return stage("muon", 1e-3, loss_type=loss_type, updates_per_batch=2, **options)


DAPO = {"epsilon_high": 0.28, "dynamic_sampling": 3}
COMPARISONS: dict[str, dict[str, dict[str, Any]]] = {
    "optimizers": {
        **{f"adamw {rate:g}": stage("adamw", rate) for rate in (1e-4, 3e-4, 1e-3)},
        **{f"muon {rate:g}": stage("muon", rate) for rate in (3e-4, 1e-3, 3e-3)},
        "muon 0.001, router frozen": stage("muon", 1e-3, freeze_router=True),
        "adamw 0.003, LoRA of rank 8": stage("adamw", 3e-3, lora={"rank": 8, "alpha": 16}),
    },
    "objectives": {
        "GRPO: mean over answers": objective("grpo"),
        "mean over groups": objective("group"),
        "mean over tokens": objective("dapo"),
        "answers, undivided": objective("grpo", scale_rewards="none"),
        "answers, the batch's deviation": objective("grpo", scale_rewards="batch"),
        "Dr. GRPO": objective("dr_grpo", scale_rewards="none"),
        "tokens, clip-higher": objective("dapo", epsilon_high=0.28),
        "DAPO": objective("dapo", **DAPO),
        "GSPO": objective("grpo", ratio_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
        "CISPO": objective("cispo", epsilon_high=5),
        "GRPO, KL 0.001": objective("grpo", beta=0.001),
        "GRPO, KL 0.04": objective("grpo", beta=0.04),
        "GRPO, KL 0.3": objective("grpo", beta=0.3),
    },
}
"""By comparison and variant the options of the stage. The others are held against a comparison's first variant."""


def main() -> None:
    """Compare, print a table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo_options", description=__doc__)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny_v4.yaml"))
    parser.add_argument("--domain", default="counting")
    parser.add_argument("--warmup", type=int, default=40, help="SFT steps of the base model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=32, help="prompts in one step, each answered 8 times")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after so long")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of the results")
    arguments = parser.parse_args()
    file = arguments.output / f"grpo_{arguments.comparison}.json"
    results = compare(arguments, file)
    show(results)
    plot(results, file.with_suffix(".png"))


def compare(arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Every variant with every seed; runs that `file` has are not run again."""
    settings = {name: str(getattr(arguments, name)) for name in ("recipe", "domain", "warmup", "steps", "prompts")}
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    results: dict[str, Any] = (
        known if known.get("settings") == settings else {"schema": 1, "settings": settings, "runs": []}
    )
    results["environment"] = describe_environment()
    changes = ["cluster.rollout_workers=1", "cluster.trainers=1", "cluster.dashboard=false"]
    recipe = load_recipe(arguments.recipe, [*changes, f"stages.base.steps={arguments.warmup}"])
    began = time.monotonic()
    with warm_base(recipe, arguments.domain) as (work, base):
        results["accuracy_before"] = accuracy(work, base, 1, arguments.domain)
        for seed in range(arguments.seeds):
            for variant in arguments.variants or COMPARISONS[arguments.comparison]:
                done = any((one["variant"], one["seed"]) == (variant, seed) for one in results["runs"])
                if done or time.monotonic() - began > 60 * arguments.minutes:
                    continue
                found = measure(work, arguments, base, variant, seed)
                results["runs"].append({"variant": variant, "seed": seed, **found})
                atomic_write(file, json.dumps(results) + "\n")
    return results


def measure(work: Work, arguments: argparse.Namespace, base: Path, variant: str, seed: int) -> dict[str, Any]:
    """One stage from the base model: the rewards of its steps, and the accuracy that it ends with."""
    import ray

    variants = COMPARISONS[arguments.comparison]
    size = {"steps": arguments.steps, "prompts_per_step": arguments.prompts, "group_size": 8}
    config = GrpoStage(kind="grpo", **(size | variants[variant]))
    name = f"grpo/{seed}"  # the same in every variant: the same prompts and random numbers
    problems = draw(work, name, arguments.domain, config.steps * config.prompts_per_step)
    client, started = work.cluster.client(), time.time()
    job = GrpoJob(
        stage=name,
        config=config,
        checkpoint=str(base),
        output=str(work.run.path / "checkpoints" / f"{seed}-{list(variants).index(variant)}"),
        prompts=prompts_of(work, problems),
        max_new_tokens=work.recipe.domains[arguments.domain].max_new_tokens,
        reward=DomainRewards(work.recipe, str(work.run.tokenizer_path), problems),
        rollout=work.recipe.rollout,
    )
    result = ray.get(work.cluster.trainers[0].grpo.remote(job, client))
    lines = [one for one in read_metrics(work.run.path / "metrics.jsonl") if "step" in one and one["time"] > started]
    ended = time.time()
    replaced = sum(one["metrics"].get("groups_replaced", 0) for one in lines)
    return {
        "rewards": [one["metrics"]["reward"] for one in lines],
        "samples": round(len(lines) * config.prompts_per_step + replaced) * config.group_size,
        "clipped": statistics.fmean(one["metrics"].get("clip_fraction", 0.0) for one in lines),
        "kl": lines[-1]["metrics"].get("kl"),
        "seconds": ended - started,
        "largest_difference": result.max_abs_logprob_diff,
        "k3": result.k3,
        "accuracy": accuracy(work, Path(result.checkpoint), (client.weight_version() or 0) + 1, arguments.domain),
    }


def by_variant(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        found.setdefault(run["variant"], []).append(run)
    return found


def show(results: Mapping[str, Any]) -> None:
    """Means over the seeds, with the lowest and the highest in brackets; differences are of runs with the same seed."""
    groups = by_variant(results)
    first = next(iter(groups), "")
    baseline = {run["seed"]: run["accuracy"] for run in groups.get(first, [])}
    print(f"accuracy before: {100 * results['accuracy_before']:.1f} %")
    heads = ["variant", "seeds", "samples", "reward, last 5 steps", "held-out accuracy", f"points above {first!r}"]
    heads += ["tokens clipped", "seconds", "largest trainer − sampler"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for variant, runs in groups.items():
        gains = [100 * (run["accuracy"] - baseline[run["seed"]]) for run in runs if run["seed"] in baseline]
        cells = [
            variant,
            str(len(runs)),
            f"{statistics.fmean(run['samples'] for run in runs):,.0f}",
            spread([statistics.fmean(run["rewards"][-5:]) for run in runs], "{:.3f}"),
            spread([100 * run["accuracy"] for run in runs], "{:.1f} %"),
            spread(gains, "{:+.1f}") if gains and variant != first else "",
            f"{100 * statistics.fmean(run['clipped'] for run in runs):.2f} %",
            f"{statistics.fmean(run['seconds'] for run in runs):.0f}",
            f"{max(run['largest_difference'] for run in runs):.1e}",
        ]
        print("| " + " | ".join(cells) + " |")


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Reward over steps: the mean over the seeds of trailing means over five steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for variant, runs in by_variant(results).items():
        curves = [smooth(run["rewards"], 5) for run in runs]
        steps = range(1, len(curves[0]) + 1)
        (line,) = axis.plot(steps, [statistics.fmean(at) for at in zip(*curves, strict=True)], label=variant)
        low, high = ([pick(at) for at in zip(*curves, strict=True)] for pick in (min, max))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel="step", ylabel="mean reward")
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
