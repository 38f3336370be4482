"""`python -m benchmarks.sft_options optimizers|routing`: options of SFT against each other at equal steps.

The recipe's model from random weights, on one domain; a variant and the next see the same batches for the same seed.
Writes NAME.json (every loss of every run) and NAME.png into the output directory. An interrupted comparison goes on
where it was when it is started again with the same settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sft_kit import Setting
from posttrain.errors import RunFailed
from posttrain.files import atomic_write
from posttrain.observe.environment import describe_environment

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def stage(rate: float, optimizer: str = "muon", **options: Any) -> dict[str, Any]:
    """Options of the SFT stage; one rate for both parts of Muon, as its updates have the size of AdamW's."""
    schedule = {"warmup_steps": 10, "schedule": "linear"}
    return {"optimizer": {"name": optimizer, "lr": rate, **schedule}, **options}


ROUTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "router frozen": {"freeze_router": True},
    "routed 1 ahead": {"anticipatory_routing": 1},
    "routed 8 ahead": {"anticipatory_routing": 8},
}
COMPARISONS: dict[str, dict[str, dict[str, Any]]] = {
    "optimizers": {f"{name} {rate:g}": stage(rate, name) for name in ("adamw", "muon") for rate in RATES},
    "routing": {
        f"{name}, rate {rate:g}": stage(rate, **options)
        for rate in (4e-3, 1.6e-2, 6.4e-2)
        for name, options in ROUTINGS.items()
    },
}


def main() -> None:
    """Run what is missing, print a table, draw the curves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft_options", description=__doc__)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny_v4.yaml"))
    parser.add_argument("--domain", default="counting")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after so long")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of the results")
    arguments = parser.parse_args()
    file = arguments.output / f"{arguments.comparison}.json"
    results = compare(arguments, file)
    show(results)
    draw(results, file.with_suffix(".png"))


def compare(arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """All runs, seed after seed; those that `file` has are not run again."""
    settings = {name: str(getattr(arguments, name)) for name in ("recipe", "domain", "steps", "batch")}
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    results: dict[str, Any] = (
        known if known.get("settings") == settings else {"schema": 1, "settings": settings, "runs": []}
    )
    results["environment"] = describe_environment()
    setting, started = Setting.load(arguments.recipe, [arguments.domain]), time.monotonic()
    variants = COMPARISONS[arguments.comparison]
    for seed in range(arguments.seeds):
        for name in arguments.variants or variants:
            done = any((run["variant"], run["seed"]) == (name, seed) for run in results["runs"])
            if done or time.monotonic() - started > 60 * arguments.minutes:
                continue
            options = {"steps": arguments.steps, "batch_size": arguments.batch, "max_length": 32, **variants[name]}
            results["runs"].append({"variant": name, "seed": seed, **measure(setting, seed, options)})
            atomic_write(file, json.dumps(results) + "\n")
    return results


def measure(setting: Setting, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """One run: its losses, and what it is worth on held-out problems; None where it broke."""
    started = time.process_time()
    try:
        model, log = setting.train(seed, **options)
    except RunFailed as failure:
        return {"failure": str(failure), "losses": [], "holdout": None, "accuracy": None}
    seconds = time.process_time() - started
    holdout, accuracy = setting.holdout(model)
    losses = [line["loss"] for line in log.lines]
    return {"losses": losses, "holdout": holdout, "accuracy": accuracy, "cpu_seconds": seconds}


def by_variant(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant that came to an end."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        found.setdefault(run["variant"], [])
        if run["losses"]:
            found[run["variant"]].append(run)
    return found


def show(results: Mapping[str, Any]) -> None:
    """Means over the seeds, with the lowest and the highest in brackets."""
    print("| variant | seeds | last losses | held-out loss | held-out accuracy | largest jump | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant, runs in by_variant(results).items():
        if not runs:
            print(f"| {variant} | 0 | | | | | |")
            continue
        cells = [
            spread([statistics.fmean(run["losses"][-10:]) for run in runs], "{:.3f}"),
            spread([run["holdout"] for run in runs], "{:.3f}"),
            spread([100 * run["accuracy"] for run in runs], "{:.1f} %"),
            spread([largest_jump(run["losses"]) for run in runs], "{:.2f}"),
            f"{statistics.fmean(run['cpu_seconds'] for run in runs):.0f}",
        ]
        print(f"| {variant} | {len(runs)} | " + " | ".join(cells) + " |")


def largest_jump(losses: Sequence[float]) -> float:
    """How far a loss is at most above the lowest mean of five before it: the size of a spike, in nats."""
    means = [statistics.fmean(losses[index : index + 5]) for index in range(len(losses) - 5)]
    return max(losses[index + 5] - min(means[: index + 1]) for index in range(len(means)))


def spread(values: Sequence[float], form: str) -> str:
    """`mean [lowest–highest]`."""
    return f"{form.format(statistics.fmean(values))} [{form.format(min(values))}–{form.format(max(values))}]"


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Loss over steps: the mean over the seeds, and between which values the seeds are; smoothed over ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for variant, runs in by_variant(results).items():
        if runs:
            panel = variant.rpartition(", ")[2] if ", " in variant else variant.partition(" ")[0]
            groups.setdefault(panel, {})[variant] = runs
    figure, axes = pyplot.subplots(1, len(groups), figsize=(4.5 * len(groups), 3.4), sharey=True, squeeze=False)
    for axis, (panel, variants) in zip(axes[0], groups.items(), strict=True):
        for variant, runs in variants.items():
            curves = [smooth(run["losses"]) for run in runs]
            steps = range(1, len(curves[0]) + 1)
            (line,) = axis.plot(steps, [statistics.fmean(at) for at in zip(*curves, strict=True)], label=variant)
            low, high = ([pick(at) for at in zip(*curves, strict=True)] for pick in (min, max))
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=panel, xlabel="step", yscale="log")
        axis.legend(fontsize=7, frameon=False)
    axes[0][0].set_ylabel("loss, nats a token")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def smooth(losses: Sequence[float], window: int = 10) -> list[float]:
    """Trailing means."""
    return [statistics.fmean(losses[max(0, index + 1 - window) : index + 1]) for index in range(len(losses))]


if __name__ == "__main__":
    main()
