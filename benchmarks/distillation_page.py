"""The comparison of students as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Runs = list[dict[str, Any]]

WINDOW = 10
"""Steps of a trailing mean in the curves."""


def by_arm(results: Mapping[str, Any]) -> dict[str, Runs]:
    """The runs of each arm, in the order in which arms were first run."""
    found: dict[str, Runs] = {}
    for run in results["runs"]:
        found.setdefault(run["arm"], []).append(run)
    return found


def domains_of(results: Mapping[str, Any]) -> list[str]:
    """The domains that are compared."""
    return list(next(iter(results["references"].values()))["accuracy"]["base"])


def show(results: Mapping[str, Any]) -> None:
    """For each arm means over the seeds, with the lowest and the highest in brackets."""
    if not results["runs"]:
        return
    domains, references = domains_of(results), list(results["references"].values())
    columns = ["model", "seeds", *domains, "mean", "of the experts", "reverse KL", "answer's length", "samples", "s"]
    print(f"| {' | '.join(columns)} |")
    print(f"|{' --- |' * len(columns)}")
    for model in ("base", *domains):
        accuracies = [one["accuracy"][model] for one in references if model in one["accuracy"]]
        name = model if model == "base" else f"expert of {model}"
        distances = [fmean(one["reverse_kl"].values()) for one in references] if model == "base" else []
        cells = [*_accuracy_cells(accuracies, domains), "", spread(distances, "{:.3f}"), _length(accuracies), "", ""]
        print(f"| {name} | {len(accuracies)} | {' | '.join(cells)} |")
    for arm, runs in by_arm(results).items():
        accuracies = [run["accuracy"] for run in runs]
        cells = [
            *_accuracy_cells(accuracies, domains),
            spread([100 * kept(results, run) for run in runs], "{:.0f} %"),
            spread([fmean(run["reverse_kl"].values()) for run in runs], "{:.3f}"),
            _length(accuracies),
            f"{runs[0]['samples']:,}",
            f"{fmean(run['seconds'] for run in runs):.0f}",
        ]
        print(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")


def _accuracy_cells(accuracies: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> list[str]:
    cells = [spread([100 * one[domain]["pass@1"] for one in accuracies], "{:.1f}") for domain in domains]
    return [*cells, spread([100 * mean_accuracy(one) for one in accuracies], "{:.1f}")]


def _length(accuracies: Sequence[Mapping[str, Any]]) -> str:
    return spread([fmean(one["mean_length"] for one in each.values()) for each in accuracies], "{:.2f}")


def mean_accuracy(accuracy: Mapping[str, Any]) -> float:
    """Over the domains."""
    return fmean(one["pass@1"] for one in accuracy.values())


def kept(results: Mapping[str, Any], run: Mapping[str, Any]) -> float:
    """The lowest share of an expert's accuracy that a student has in that expert's domain; of experts above 0."""
    experts = results["references"][str(run["seed"])]["accuracy"]
    best = {domain: experts[domain][domain]["pass@1"] for domain in run["accuracy"] if domain in experts}
    shares = [run["accuracy"][domain]["pass@1"] / share for domain, share in best.items() if share]
    return min(shares, default=math.nan)


def spread(values: Sequence[float], form: str) -> str:
    """`mean [lowest–highest]`, of a single value the value."""
    if not values:
        return ""
    mean = form.format(fmean(values))
    return mean if len(values) == 1 else f"{mean} [{form.format(min(values))}–{form.format(max(values))}]"


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Accuracy with 95 % intervals, a point for each seed; and over the samples reward, reverse KL and length."""
    if not results["runs"]:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(by_arm(results), (*(f"C{number}" for number in range(10)), "black"), strict=False))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.5))
    _plot_accuracy(results, axes[0][0])
    panels = (
        (axes[0][1], "samples", "reward", "share of right answers while training"),
        (axes[0][2], "seconds", "reward", "the same, over wall-clock seconds"),
        (axes[1][0], "samples", "reverse_kl", "KL(student ‖ expert), nats a token"),
        (axes[1][1], "samples", "completion_length", "tokens of an answer"),
    )
    for axis, over, metric, title in panels:
        for arm, runs in by_arm(results).items():
            for run in runs:
                points = curve(run, over, metric)
                if points:
                    axis.plot(*zip(*points, strict=True), color=colours[arm], linewidth=0.9, alpha=0.8, label=arm)
        axis.set(title=title, xlabel=over)
    axes[1][0].set_yscale("log")
    for arm, colour in colours.items():
        axes[1][2].plot([], [], color=colour, label=arm)
    axes[1][2].legend(loc="center", frameon=False)
    axes[1][2].axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _plot_accuracy(results: Mapping[str, Any], axis: Any) -> None:
    arms = by_arm(results)
    for number, domain in enumerate(domains_of(results)):
        for row, runs in enumerate(arms.values()):
            for place, run in enumerate(runs):
                cell = run["accuracy"][domain]
                height = row + 0.28 * number + 0.07 * place
                axis.plot(cell["ci95"], [height, height], color=f"C{number}", linewidth=1)
                axis.plot(
                    [cell["pass@1"]], [height], ".", color=f"C{number}", label=domain if not row + place else None
                )
        for reference in results["references"].values():
            if domain in reference["accuracy"]:
                axis.axvline(
                    reference["accuracy"][domain][domain]["pass@1"], color=f"C{number}", alpha=0.3, linewidth=1
                )
    axis.set_yticks([row + 0.2 for row in range(len(arms))], list(arms))
    axis.invert_yaxis()
    axis.set(title="pass@1, 95 % intervals (lines: the experts)", xlim=(0, 1))
    axis.legend(frameon=False, fontsize=8)


def curve(run: Mapping[str, Any], over: str, metric: str) -> list[tuple[float, float]]:
    """Trailing means of a metric over samples or seconds. Where the reverse KL is learned it is `kl`."""
    values: list[float] = []
    points = []
    for one in run["steps"]:
        value = one.get(metric, one.get("kl") if metric == "reverse_kl" and run["arm"] == "reverse_kl" else None)
        if value is not None:
            values.append(value)
            at = one["seconds"] if over == "seconds" else run["samples"] * one["step"] / one["steps"]
            points.append((at, fmean(values[-WINDOW:])))
    return points
